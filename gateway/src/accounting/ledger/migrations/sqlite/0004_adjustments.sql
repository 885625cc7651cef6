-- How a request was served, and the images that it brought: what its price depends on beside tokens.
ALTER TABLE ledger ADD COLUMN service_tier TEXT;
ALTER TABLE ledger ADD COLUMN images INTEGER NOT NULL DEFAULT 0;

-- A row that is priced again stays as it is. What it counts as from then on stands here: of several, what the last one says.
CREATE TABLE adjustment (
    request_id TEXT NOT NULL, attempt INTEGER NOT NULL, role TEXT NOT NULL, number INTEGER NOT NULL, -- from 0
    adjusted_ns INTEGER NOT NULL, reason TEXT NOT NULL,
    billed_before_nano_usd INTEGER NOT NULL, billed_after_nano_usd INTEGER NOT NULL,
    provider_cost_before_nano_usd INTEGER NOT NULL, provider_cost_after_nano_usd INTEGER NOT NULL,
    price_version_before TEXT NOT NULL, price_version_after TEXT NOT NULL,
    unpriced_before INTEGER NOT NULL, unpriced_after INTEGER NOT NULL,
    PRIMARY KEY (request_id, attempt, role, number)
) WITHOUT ROWID;

-- By how much they change what the hour's rows sum up to.
ALTER TABLE spend_hour ADD COLUMN billed_adjusted_nano_usd INTEGER NOT NULL DEFAULT 0;
ALTER TABLE spend_hour ADD COLUMN provider_cost_adjusted_nano_usd INTEGER NOT NULL DEFAULT 0;
