-- The columns are those of SQLite's table, and one more: which log a row came from. Request ids begin with their time, so
-- that a month's rows are a partition, and a request id is unique over all of them. Times begin with 0 for five hundred years;
-- what has another id is in `ledger_other`. There is no default partition: with one, a new month would have to wait for all who read.
CREATE TABLE ledger (
    request_id TEXT COLLATE "C" NOT NULL, attempt BIGINT NOT NULL, role TEXT NOT NULL, response_id TEXT NOT NULL,
    trace_id TEXT COLLATE "C" NOT NULL, started_ns BIGINT NOT NULL, ended_ns BIGINT NOT NULL, tenant TEXT NOT NULL,
    key_id TEXT NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL, variant TEXT NOT NULL, provider TEXT NOT NULL,
    op TEXT NOT NULL, stream BIGINT NOT NULL, cache TEXT NOT NULL, outcome TEXT NOT NULL,
    input_tokens BIGINT NOT NULL, cache_read_tokens BIGINT NOT NULL, cache_write_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL, reasoning_tokens BIGINT NOT NULL, usage_source TEXT NOT NULL,
    billed_nano_usd BIGINT NOT NULL, provider_cost_nano_usd BIGINT NOT NULL, price_version TEXT NOT NULL,
    config_hash TEXT NOT NULL, user_id TEXT, unpriced BIGINT NOT NULL,
    log BIGINT NOT NULL,
    PRIMARY KEY (request_id, attempt, role)
) PARTITION BY RANGE (request_id);
CREATE TABLE ledger_other PARTITION OF ledger FOR VALUES FROM ('1') TO (MAXVALUE);
CREATE INDEX ledger_by_time ON ledger (started_ns);
-- Traces of our own begin like their requests' ids and are found by them.
CREATE INDEX ledger_by_foreign_trace ON ledger (tenant, trace_id)
    WHERE substr(trace_id, 1, 16) <> substr(request_id, 1, 16)
      AND role <> 'shadow' AND outcome NOT IN ('failed_over', 'released');

CREATE TABLE feedback (
    request_id TEXT COLLATE "C" NOT NULL, name TEXT NOT NULL, key_id TEXT NOT NULL, kind TEXT NOT NULL,
    number DOUBLE PRECISION, label TEXT, comment TEXT, created_ns BIGINT NOT NULL, updated_ns BIGINT NOT NULL,
    PRIMARY KEY (request_id, name, key_id)
) PARTITION BY RANGE (request_id);
CREATE TABLE feedback_other PARTITION OF feedback FOR VALUES FROM ('1') TO (MAXVALUE);

-- Each log has sums of its own: replicas do not wait for each other's rows of the hour.
CREATE TABLE spend_hour (
    hour BIGINT NOT NULL, -- since the Unix epoch
    log BIGINT NOT NULL,
    tenant TEXT NOT NULL, key_id TEXT NOT NULL, user_id TEXT NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL,
    variant TEXT NOT NULL, role TEXT NOT NULL, outcome TEXT NOT NULL, price_version TEXT NOT NULL,
    requests BIGINT NOT NULL, input_tokens BIGINT NOT NULL, cache_read_tokens BIGINT NOT NULL,
    cache_write_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, reasoning_tokens BIGINT NOT NULL,
    billed_nano_usd BIGINT NOT NULL, provider_cost_nano_usd BIGINT NOT NULL,
    begun BIGINT NOT NULL, made_input_tokens BIGINT NOT NULL, made_output_tokens BIGINT NOT NULL,
    PRIMARY KEY (hour, log, tenant, key_id, user_id, route, model, variant, role, outcome, price_version)
);

-- The count of each log, and what was here of it when that began.
CREATE TABLE ledger_count (
    log BIGINT PRIMARY KEY, epoch BIGINT NOT NULL, rows BIGINT NOT NULL, input_tokens BIGINT NOT NULL,
    cache_read_tokens BIGINT NOT NULL, cache_write_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL, billed_nano_usd BIGINT NOT NULL, provider_cost_nano_usd BIGINT NOT NULL
);

-- Rows of requests whose ids come before this are not kept any more; their sums are.
CREATE TABLE ledger_kept (first_id TEXT COLLATE "C" NOT NULL);
