-- What every folder has, also those from before there were migrations.
CREATE TABLE IF NOT EXISTS ledger (
    request_id TEXT NOT NULL, attempt INTEGER NOT NULL, role TEXT NOT NULL, response_id TEXT NOT NULL,
    trace_id TEXT NOT NULL, started_ns INTEGER NOT NULL, ended_ns INTEGER NOT NULL, tenant TEXT NOT NULL,
    key_id TEXT NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL, variant TEXT NOT NULL, provider TEXT NOT NULL,
    op TEXT NOT NULL, stream INTEGER NOT NULL, cache TEXT NOT NULL, outcome TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, cache_read_tokens INTEGER NOT NULL, cache_write_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL, usage_source TEXT NOT NULL,
    billed_nano_usd INTEGER NOT NULL, provider_cost_nano_usd INTEGER NOT NULL, price_version TEXT NOT NULL,
    config_hash TEXT NOT NULL,
    PRIMARY KEY (request_id, attempt, role)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ledger_by_time ON ledger (started_ns);

CREATE TABLE IF NOT EXISTS feedback (
    request_id TEXT NOT NULL, name TEXT NOT NULL, key_id TEXT NOT NULL, kind TEXT NOT NULL, number REAL, label TEXT,
    comment TEXT, created_ns INTEGER NOT NULL, updated_ns INTEGER NOT NULL,
    PRIMARY KEY (request_id, name, key_id)
) WITHOUT ROWID;
-- Traces of our own begin like their requests' ids and are found by them.
CREATE INDEX IF NOT EXISTS ledger_by_foreign_trace ON ledger (tenant, trace_id)
    WHERE substr(trace_id, 1, 16) <> substr(request_id, 1, 16)
      AND role <> 'shadow' AND outcome NOT IN ('failed_over', 'released');
