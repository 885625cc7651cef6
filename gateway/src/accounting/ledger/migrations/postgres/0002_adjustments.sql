-- How a request was served, and the images that it brought: what its price depends on beside tokens.
ALTER TABLE ledger ADD COLUMN service_tier TEXT;
ALTER TABLE ledger ADD COLUMN images BIGINT NOT NULL DEFAULT 0;

-- A row that is priced again stays as it is. What it counts as from then on stands here: of several, what the last one says.
CREATE TABLE adjustment (
    request_id TEXT COLLATE "C" NOT NULL, attempt BIGINT NOT NULL, role TEXT NOT NULL, number BIGINT NOT NULL, -- from 0
    adjusted_ns BIGINT NOT NULL, reason TEXT NOT NULL,
    billed_before_nano_usd BIGINT NOT NULL, billed_after_nano_usd BIGINT NOT NULL,
    provider_cost_before_nano_usd BIGINT NOT NULL, provider_cost_after_nano_usd BIGINT NOT NULL,
    price_version_before TEXT NOT NULL, price_version_after TEXT NOT NULL,
    unpriced_before BIGINT NOT NULL, unpriced_after BIGINT NOT NULL,
    PRIMARY KEY (request_id, attempt, role, number)
) PARTITION BY RANGE (request_id);

-- Its other partitions are made by whoever adjusts rows of a month.
CREATE TABLE adjustment_other PARTITION OF adjustment FOR VALUES FROM ('1') TO (MAXVALUE);

-- By how much they change what the hour's rows sum up to.
ALTER TABLE spend_hour ADD COLUMN billed_adjusted_nano_usd BIGINT NOT NULL DEFAULT 0;
ALTER TABLE spend_hour ADD COLUMN provider_cost_adjusted_nano_usd BIGINT NOT NULL DEFAULT 0;
