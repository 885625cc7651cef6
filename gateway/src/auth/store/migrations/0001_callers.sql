-- What a key may and until when; names are a tenant's own; what changed last is found without reading everything.
ALTER TABLE keys RENAME TO keys_before;
CREATE TABLE keys (
    id TEXT PRIMARY KEY NOT NULL,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    hash BLOB NOT NULL,
    -- The hash before the last rotation, and until when it counts.
    previous_hash BLOB,
    previous_until_ns INTEGER,
    created_ns INTEGER NOT NULL,
    expires_ns INTEGER,
    disabled_ns INTEGER,
    revoked_ns INTEGER,
    user_id TEXT,
    -- JSON: lists of texts, and an object of texts. NULL is "all of them" where there is a choice.
    tags TEXT NOT NULL DEFAULT '[]',
    metadata TEXT NOT NULL DEFAULT '{}',
    scopes TEXT,
    models TEXT,
    networks TEXT,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER,
    concurrency INTEGER,
    nano_usd_per_day INTEGER,
    -- Grows with every change to any key.
    changed_seq INTEGER NOT NULL,
    UNIQUE (tenant, name)
) WITHOUT ROWID;
INSERT INTO keys (id, tenant, name, hash, created_ns, revoked_ns,
                  requests_per_minute, tokens_per_minute, concurrency, nano_usd_per_day, changed_seq)
    SELECT id, tenant, name, hash, created_ns, revoked_ns,
           requests_per_minute, tokens_per_minute, concurrency, nano_usd_per_day, 1
    FROM keys_before;
DROP TABLE keys_before;
CREATE INDEX keys_changed ON keys (changed_seq);
