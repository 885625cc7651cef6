//! The one record of a request: what we learned, and when. Stages add to it and never read it to decide.
//!
//! Closed once, whatever happens: `invoke::close` from pingora's `logging`, or its own drop when a panic skips that.
//! Metrics, span, access log and the list of recent requests are projections of the closed record, so they agree.

mod record;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use opentelemetry::{SpanId, TraceId};
use uuid::Uuid;

use crate::accounting::settlement::Receipt;
use crate::api::openai::request::Sampling;
use crate::ports::{Clock, Priority};
use crate::refusal::Refusal;
pub use record::{Attempt, Child, EMBEDDED, Marks, Record};

/// Takes closed records. Implemented by `observe`.
pub trait Observer: Send + Sync {
    fn opened(&self);
    fn closed(&self, record: Record);
}

/// A trace's place in the caller's trace, if they sent a valid `traceparent` (W3C Trace Context, version 00).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub trace_id: TraceId,
    pub parent: SpanId,
}

impl TraceParent {
    /// Parses `00-<32 hex>-<16 hex>-<2 hex>`; anything else is `None`, and the request starts a trace of its own.
    pub fn parse(header: &str) -> Option<TraceParent> {
        let mut parts = header.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lower_hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        };
        if version != "00"
            || parts.next().is_some()
            || !lower_hex(trace, 32)
            || !lower_hex(span, 16)
            || !lower_hex(flags, 2)
        {
            return None;
        }
        let trace_id = TraceId::from_hex(trace).ok()?;
        let parent = SpanId::from_hex(span).ok()?;
        (trace_id != TraceId::INVALID && parent != SpanId::INVALID).then_some(TraceParent { trace_id, parent })
    }
}

/// A request under way.
pub struct Exchange {
    record: Option<Record>,
    began: Instant,
    receipt: Arc<OnceLock<Receipt>>,
    observer: Arc<dyn Observer>,
    clock: Arc<dyn Clock>,
}

impl Exchange {
    pub fn open(observer: Arc<dyn Observer>, clock: Arc<dyn Clock>) -> Exchange {
        let began = clock.instant();
        observer.opened();
        let random = Uuid::now_v7();
        let noise = Uuid::new_v4();
        let (noise, id) = (noise.as_bytes(), random.as_bytes());
        // A trace begins like its request's id, with the time, so that the ledger finds it without an index of its own.
        // The half that samplers look at is random to the last bit that counts.
        let mut trace = [0; 16];
        trace[..8].copy_from_slice(&id[..8]);
        trace[8..].copy_from_slice(&noise[..8]);
        let record = Record {
            is_shadow: false,
            request_id: random.simple().to_string(),
            response_id: None,
            trace_id: TraceId::from_bytes(trace),
            // The random half of the request id is as good as another random number.
            span_id: SpanId::from_bytes([id[8], id[9], id[10], id[11], id[12], id[13], id[14], id[15]]),
            parent_span_id: None,
            started_ns: clock.now_ns(),
            marks: Marks::default(),
            client: None,
            method: String::new(),
            path: String::new(),
            op: "other",
            tenant: String::new(),
            key_id: String::new(),
            key_name: String::new(),
            authenticated: false,
            quotas: None,
            session: None,
            user: None,
            route: "none".into(),
            model: "none".into(),
            variant: "none".into(),
            provider: EMBEDDED.into(),
            stream: false,
            priority: Priority::default(),
            cache: "none",
            cache_waited: Duration::ZERO,
            config_hash: String::new(),
            price_version: String::new(),
            status: 0,
            outcome: "",
            error_type: "",
            finishes: Vec::new(),
            receipt: None,
            engine: None,
            attempts: Vec::new(),
            max_tokens: None,
            sampling: Sampling::default(),
            stop: Vec::new(),
            bytes_in: 0,
            bytes_out: 0,
        };
        Exchange { record: Some(record), began, receipt: Arc::default(), observer, clock }
    }

    /// One that nobody watches.
    #[cfg(test)]
    pub fn for_tests() -> Exchange {
        struct Nobody;
        impl Observer for Nobody {
            fn opened(&self) {}
            fn closed(&self, _record: Record) {}
        }
        Exchange::open(Arc::new(Nobody), Arc::new(crate::ports::SystemClock))
    }

    /// Adds facts. Does nothing once closed.
    pub fn note(&mut self, facts: impl FnOnce(&mut Record)) {
        if let Some(record) = &mut self.record {
            facts(record);
        }
    }

    /// Adds facts and the moment at which they became known.
    pub fn mark(&mut self, facts: impl FnOnce(&mut Record, Duration)) {
        let now = self.elapsed();
        if let Some(record) = &mut self.record {
            facts(record, now);
        }
    }

    pub fn elapsed(&self) -> Duration {
        self.clock.instant().saturating_duration_since(self.began)
    }

    /// Where the settlement leaves its receipt.
    pub fn receipt(&self) -> Arc<OnceLock<Receipt>> {
        self.receipt.clone()
    }

    /// What is known so far; `None` once closed.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Notes that we said no.
    pub fn refused(&mut self, refusal: &Refusal) {
        let described = refusal.describe();
        self.note(|record| {
            // What was sent was sent: a hang-up after the 200 does not change it.
            if record.status == 0 {
                record.status = described.status;
            }
            record.error_type = described.code;
        });
    }

    /// The end. Everything that watches learns of the request here, once.
    pub fn close(&mut self) {
        if self.record.is_none() {
            return;
        }
        // Before the record is taken: whatever fails here, the drop still has it to close.
        let closed = self.elapsed();
        let Some(mut record) = self.record.take() else { return };
        record.marks.closed = closed;
        record.receipt = self.receipt.get().copied();
        if let (Some(attempt), Some(receipt)) = (record.attempts.last_mut(), &record.receipt)
            && attempt.outcome.is_empty()
        {
            (attempt.outcome, attempt.ended) = (receipt.outcome.as_str(), closed);
        }
        let panicked = std::thread::panicking();
        if record.status == 0 {
            record.status = if panicked { 500 } else { 499 };
        }
        record.outcome = match (&record.receipt, panicked) {
            // The ledger's word stands, also when the panic came after it was given.
            (Some(receipt), _) => receipt.outcome.as_str(),
            (None, true) => "panicked",
            (None, _) if record.status == 499 => "aborted",
            (None, _) if record.status >= 400 => "refused",
            (None, _) => "answered",
        };
        if panicked {
            record.error_type = "panic";
        } else if record.error_type.is_empty() && record.outcome == "aborted" {
            record.error_type = Refusal::ClientGone.describe().code;
        }
        self.observer.closed(record);
    }
}

impl Drop for Exchange {
    /// pingora skips `logging` when a request panics; the record must not depend on it.
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::ports::SystemClock;

    #[derive(Default)]
    struct Seen(Mutex<Vec<Record>>);

    impl Observer for Seen {
        fn opened(&self) {}
        fn closed(&self, record: Record) {
            self.0.lock().unwrap().push(record);
        }
    }

    #[test]
    fn an_exchange_is_closed_exactly_once() {
        let seen = Arc::new(Seen::default());
        let mut exchange = Exchange::open(seen.clone(), Arc::new(SystemClock));
        exchange.note(|record| record.status = 200);
        exchange.close();
        drop(exchange);
        assert_eq!(seen.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_panic_leaves_a_record_that_says_so() {
        let seen = Arc::new(Seen::default());
        let observer = seen.clone();
        let _ = std::panic::catch_unwind(move || {
            let _exchange = Exchange::open(observer, Arc::new(SystemClock));
            std::panic::resume_unwind(Box::new("a bug"));
        });
        let seen = seen.0.lock().unwrap();
        assert_eq!((seen[0].outcome, seen[0].status, seen[0].error_type), ("panicked", 500, "panic"));
    }

    #[test]
    fn an_upstream_is_told_the_id_of_the_span_that_its_attempt_will_have() {
        let exchange = Exchange::open(Arc::new(Seen::default()), Arc::new(SystemClock));
        let record = exchange.record().unwrap();
        let mut ids = std::collections::HashSet::from([record.span_id]);
        for child in [Child::Inference, Child::Phase(0), Child::Phase(1), Child::Phase(2)] {
            assert!(ids.insert(record.child_id(child)));
        }
        for attempt in [0, 1, 2, 255, 256, u32::MAX] {
            let told = TraceParent::parse(&record.traceparent(Child::Attempt(attempt))).unwrap();
            assert_eq!(told.trace_id, record.trace_id);
            assert_eq!(told.parent, record.child_id(Child::Attempt(attempt)));
            assert!(ids.insert(told.parent), "every span has an id of its own");
        }
    }

    #[test]
    fn a_trace_begins_like_its_request_and_goes_on_at_random() {
        let traces = (0..4_000).map(|_| {
            let exchange = Exchange::open(Arc::new(Seen::default()), Arc::new(SystemClock));
            let record = exchange.record().unwrap();
            let trace = record.trace_id.to_string();
            assert_eq!(trace[..16], record.request_id[..16]);
            u64::from_str_radix(&trace[16..], 16).unwrap()
        });
        // What a sampler with a ratio of one quarter keeps.
        let kept = traces.filter(|random| random >> 1 < 1 << 61).count();
        assert!((800..1_200).contains(&kept), "{kept} of 4,000");
    }

    #[test]
    fn only_a_valid_traceparent_is_followed() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(TraceParent::parse(good).is_some());
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
        }
    }
}
