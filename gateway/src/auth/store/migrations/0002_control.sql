-- What operators decide beside keys, and the record of every decision.
CREATE TABLE tenants (
    id TEXT PRIMARY KEY NOT NULL,
    name TEXT,
    -- JSON: a list of texts.
    tags TEXT NOT NULL DEFAULT '[]',
    disabled_ns INTEGER,
    changed_seq INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE rules (
    name TEXT PRIMARY KEY NOT NULL,
    -- JSON: the words of a `[[limits.rules]]`, as they were given.
    rule TEXT NOT NULL,
    changed_seq INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE audit (
    n INTEGER PRIMARY KEY NOT NULL,
    at_ns INTEGER NOT NULL,
    actor TEXT NOT NULL,
    -- JSON, never with a secret.
    change TEXT NOT NULL,
    previous_hash BLOB NOT NULL,
    hash BLOB NOT NULL
);
-- The last entry of the record, also where that entry is gone. Every change of a row carries the number of its entry.
CREATE TABLE head (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    n INTEGER NOT NULL,
    hash BLOB NOT NULL
);
INSERT INTO head SELECT 1, COALESCE(MAX(changed_seq), 0), zeroblob(32) FROM keys;
