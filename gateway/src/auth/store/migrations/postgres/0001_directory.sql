-- The tables are those of a data folder. Texts are in the order of their bytes, whatever the database's language is.
CREATE TABLE glassgate_keys (
    id TEXT COLLATE "C" PRIMARY KEY,
    tenant TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    hash BYTEA NOT NULL,
    -- The hash before the last rotation, and until when it counts.
    previous_hash BYTEA,
    previous_until_ns BIGINT,
    created_ns BIGINT NOT NULL,
    expires_ns BIGINT,
    disabled_ns BIGINT,
    revoked_ns BIGINT,
    user_id TEXT,
    -- JSON: lists of texts, and an object of texts. NULL is "all of them" where there is a choice.
    tags TEXT NOT NULL,
    metadata TEXT NOT NULL,
    scopes TEXT,
    models TEXT,
    networks TEXT,
    requests_per_minute BIGINT,
    tokens_per_minute BIGINT,
    concurrency BIGINT,
    nano_usd_per_day BIGINT,
    -- The number of the change that made the row what it is, as in all tables.
    changed_seq BIGINT NOT NULL,
    UNIQUE (tenant, name)
);
CREATE INDEX glassgate_keys_changed ON glassgate_keys (changed_seq, id);
CREATE TABLE glassgate_tenants (
    id TEXT COLLATE "C" PRIMARY KEY,
    name TEXT,
    -- JSON: a list of texts.
    tags TEXT NOT NULL,
    disabled_ns BIGINT,
    changed_seq BIGINT NOT NULL
);
CREATE TABLE glassgate_rules (
    name TEXT COLLATE "C" PRIMARY KEY,
    -- JSON: the words of a `[[limits.rules]]`, as they were given.
    rule TEXT NOT NULL,
    changed_seq BIGINT NOT NULL
);
CREATE TABLE glassgate_audit (
    n BIGINT PRIMARY KEY,
    at_ns BIGINT NOT NULL,
    actor TEXT NOT NULL,
    -- JSON, never with a secret.
    change TEXT NOT NULL,
    previous_hash BYTEA NOT NULL,
    hash BYTEA NOT NULL
);
-- The last entry of the record, and by which pepper the hashes were made. Whoever makes a change holds this row.
CREATE TABLE glassgate_head (
    one BIGINT PRIMARY KEY CHECK (one = 1),
    n BIGINT NOT NULL,
    hash BYTEA NOT NULL,
    pepper TEXT
);
INSERT INTO glassgate_head VALUES (1, 0, decode(repeat('00', 32), 'hex'), NULL);
