-- Who a key asked for; what had no price; sums by the hour, kept in the transaction that brings the rows; and what the log counts from.
ALTER TABLE ledger ADD COLUMN user_id TEXT;
ALTER TABLE ledger ADD COLUMN unpriced INTEGER NOT NULL DEFAULT 0;

CREATE TABLE spend_hour (
    hour INTEGER NOT NULL, -- since the Unix epoch
    tenant TEXT NOT NULL, key_id TEXT NOT NULL, user_id TEXT NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL,
    variant TEXT NOT NULL, role TEXT NOT NULL, outcome TEXT NOT NULL, price_version TEXT NOT NULL,
    requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, cache_read_tokens INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
    billed_nano_usd INTEGER NOT NULL, provider_cost_nano_usd INTEGER NOT NULL,
    PRIMARY KEY (hour, tenant, key_id, user_id, route, model, variant, role, outcome, price_version)
) WITHOUT ROWID;
INSERT INTO spend_hour
SELECT started_ns / 3600000000000, tenant, key_id, '', route, model, variant, role, outcome, price_version,
       COUNT(*), SUM(input_tokens), SUM(cache_read_tokens), SUM(cache_write_tokens), SUM(output_tokens),
       SUM(reasoning_tokens), SUM(billed_nano_usd), SUM(provider_cost_nano_usd)
FROM ledger GROUP BY 1, 2, 3, 5, 6, 7, 8, 9, 10;

-- One row: the count of the log that this store belongs to, and what was here when it began.
CREATE TABLE ledger_count (
    epoch INTEGER NOT NULL, rows INTEGER NOT NULL, input_tokens INTEGER NOT NULL, cache_read_tokens INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
    billed_nano_usd INTEGER NOT NULL, provider_cost_nano_usd INTEGER NOT NULL
);
