-- Tells by which pepper the hashes were made, and nothing about it; NULL until the next change.
ALTER TABLE head ADD COLUMN pepper TEXT;
