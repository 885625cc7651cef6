-- What limits have counted, by the hour: a start reads it from here and not from every row of the month.
ALTER TABLE spend_hour ADD COLUMN begun INTEGER NOT NULL DEFAULT 0;
ALTER TABLE spend_hour ADD COLUMN made_input_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE spend_hour ADD COLUMN made_output_tokens INTEGER NOT NULL DEFAULT 0;

-- Users who had no sum of their own share `other`; those from before there were users have no name.
WITH counted AS (
    SELECT started_ns / 3600000000000 AS hour, tenant, key_id,
           CASE WHEN user_id IS NULL THEN ''
                WHEN EXISTS (SELECT 1 FROM spend_hour
                             WHERE hour = started_ns / 3600000000000 AND user_id = ledger.user_id) THEN user_id
                ELSE 'other' END AS user_id,
           route, model, variant, role, outcome, price_version,
           SUM(attempt = 0 AND outcome <> 'released') AS begun,
           SUM((cache IN ('none', 'miss')) * (input_tokens + cache_read_tokens + cache_write_tokens)) AS input,
           SUM((cache IN ('none', 'miss')) * (output_tokens + reasoning_tokens)) AS output
    FROM ledger GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
)
UPDATE spend_hour SET begun = counted.begun, made_input_tokens = counted.input, made_output_tokens = counted.output
FROM counted
WHERE spend_hour.hour = counted.hour AND spend_hour.tenant = counted.tenant AND spend_hour.key_id = counted.key_id
  AND spend_hour.user_id = counted.user_id AND spend_hour.route = counted.route AND spend_hour.model = counted.model
  AND spend_hour.variant = counted.variant AND spend_hour.role = counted.role AND spend_hour.outcome = counted.outcome
  AND spend_hour.price_version = counted.price_version;

-- Rows of requests whose ids come before this are not kept any more; their sums are.
CREATE TABLE ledger_kept (first_id TEXT NOT NULL);
