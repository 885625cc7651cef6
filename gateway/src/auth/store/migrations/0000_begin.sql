-- What the first version made. Columns that came later without a migration are added by `migrate.rs`.
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY NOT NULL,
    name TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    hash BLOB NOT NULL,
    created_ns INTEGER NOT NULL,
    revoked_ns INTEGER,
    requests_per_minute INTEGER
) WITHOUT ROWID;
