//! The `glassgate` object: what we know of an answer beyond OpenAI's fields. Its shape is in `tests/golden/answer.txt`.

use serde::Serialize;

use crate::accounting::settlement::Receipt;
use crate::exchange::Record;

#[derive(Serialize)]
pub struct Glassgate<'a> {
    request_id: &'a str,
    trace_id: String,
    route: &'a str,
    model: &'a str,
    variant: &'a str,
    cache: &'a str,
    config_hash: &'a str,
    usage: crate::accounting::core::Usage,
    usage_source: &'static str,
    /// Decimal US dollars, nine places.
    cost_usd: String,
    price_version: &'a str,
    timing_ms: Timing,
}

#[derive(Serialize)]
struct Timing {
    queue: Option<f64>,
    prefill: Option<f64>,
    decode: Option<f64>,
    first_token: Option<f64>,
}

impl<'a> Glassgate<'a> {
    pub fn new(record: &'a Record, receipt: &Receipt) -> Self {
        let millis = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        Glassgate {
            request_id: &record.request_id,
            trace_id: record.trace_id.to_string(),
            route: &record.route,
            model: &record.model,
            variant: &record.variant,
            cache: record.cache,
            config_hash: &record.config_hash,
            usage: receipt.usage,
            usage_source: receipt.usage_source.as_str(),
            cost_usd: receipt.billed.to_string(),
            price_version: &record.price_version,
            timing_ms: Timing {
                queue: record.engine.map(|engine| millis(engine.queue)),
                prefill: record.engine.and_then(|engine| engine.prefill).map(millis),
                decode: record.engine.and_then(|engine| engine.decode).map(millis),
                first_token: record.first_token().map(millis),
            },
        }
    }
}
