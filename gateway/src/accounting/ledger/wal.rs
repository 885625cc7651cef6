//! The bytes of the write-ahead log: framing, checksums, and what a crash leaves behind. No files, no threads.
//!
//! A record is `magic | length | crc32c | sequence | kind | payload`, little-endian; the checksum covers everything
//! after it. Payloads are JSON, so that an operator can read a log that no program will open: ledger rows, and totals of
//! them. What was ever written is read for ever: `tests/golden/wal_v1.bin` is what the first version wrote.

use std::collections::HashMap;

use super::super::core::{NanoUsd, Usage};
use super::super::row::{Outcome, Role, Row, UsageSource};
use super::totals::Totals;

const MAGIC: [u8; 4] = *b"GGw1";
/// magic 4 + length 4 + crc 4 + sequence 8 + kind 1
const HEADER_BYTES: usize = 21;
/// A row is about 700 bytes; anything near this is no row of ours.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;
/// How much longer a terminal row can be than its intent: six numbers of up to 20 digits and four longer words.
const GROWTH_BYTES: u64 = 232;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The row that stands if nothing follows.
    Intent,
    /// The row that stands.
    Terminal,
    /// The row that stands instead of what was written before.
    Amended,
}

/// The kinds of records as they are written. What was ever given a number keeps it.
const INTENT: u8 = 1;
const TERMINAL: u8 = 2;
const TOTALS: u8 = 3;
const AMENDED: u8 = 4;

/// Appends one framed record to `out` and returns its length in bytes.
pub fn encode(sequence: u64, kind: Kind, row: &Row, out: &mut Vec<u8>) -> usize {
    let kind = match kind {
        Kind::Intent => INTENT,
        Kind::Terminal => TERMINAL,
        Kind::Amended => AMENDED,
    };
    frame(sequence, kind, row, out)
}

/// Appends a record of totals to `out` and returns its length in bytes.
pub fn encode_totals(sequence: u64, totals: &Totals, out: &mut Vec<u8>) -> usize {
    frame(sequence, TOTALS, totals, out)
}

/// The most that totals of so many segments take: twelve numbers of up to 20 digits, their names, and the segments.
pub fn totals_bytes_max(segments: usize) -> u64 {
    430 + 21 * segments as u64
}

fn frame(sequence: u64, kind: u8, payload: &impl serde::Serialize, out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&sequence.to_le_bytes());
    out.push(kind);
    // Writing a plain struct of strings and integers into memory has no way to fail.
    let _ = serde_json::to_writer(&mut *out, payload);
    let payload = (out.len() - start - HEADER_BYTES) as u32;
    out[start + 4..start + 8].copy_from_slice(&payload.to_le_bytes());
    let crc = crc32c::crc32c(&out[start + 12..]);
    out[start + 8..start + 12].copy_from_slice(&crc.to_le_bytes());
    out.len() - start
}

/// Room to keep for the end of a request whose intent took `intent_bytes`.
pub fn slot_bytes(intent_bytes: usize) -> u64 {
    intent_bytes as u64 + GROWTH_BYTES
}

/// What one segment's bytes hold.
#[derive(Debug, Default)]
pub struct Scan {
    pub records: Vec<(u64, Kind, Row)>,
    /// Totals with their places among the records.
    pub totals: Vec<(u64, Totals)>,
    /// Bytes that are no record but are followed by one: something damaged the file.
    pub damaged_bytes: u64,
    /// Bytes at the end that were never finished: an ordinary crash.
    pub torn_bytes: u64,
}

/// Reads every intact record. Never panics and never invents a row, whatever the bytes are.
pub fn scan(bytes: &[u8]) -> Scan {
    let mut found = Scan::default();
    let mut at = 0;
    let mut unread_since = 0;
    while at < bytes.len() {
        match decode(&bytes[at..]) {
            Some((length, record)) => {
                found.damaged_bytes += (at - unread_since) as u64;
                match record {
                    Record::Row(sequence, kind, row) => found.records.push((sequence, kind, row)),
                    Record::Totals(sequence, totals) => found.totals.push((sequence, totals)),
                }
                at += length;
                unread_since = at;
            }
            None => at += 1,
        }
    }
    found.torn_bytes = (at - unread_since) as u64;
    found
}

#[allow(clippy::large_enum_variant, reason = "nearly all are rows")]
enum Record {
    Row(u64, Kind, Row),
    Totals(u64, Totals),
}

fn decode(bytes: &[u8]) -> Option<(usize, Record)> {
    let header = bytes.get(..HEADER_BYTES)?;
    if header[..4] != MAGIC {
        return None;
    }
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let payload = number(4) as usize;
    if payload > PAYLOAD_BYTES_MAX {
        return None;
    }
    let end = HEADER_BYTES + payload;
    let checked = bytes.get(12..end)?;
    if crc32c::crc32c(checked) != number(8) {
        return None;
    }
    let sequence = u64::from(number(12)) | u64::from(number(16)) << 32;
    let payload = &bytes[HEADER_BYTES..end];
    let row = |kind| Some(Record::Row(sequence, kind, serde_json::from_slice(payload).ok()?));
    let record = match header[20] {
        INTENT => row(Kind::Intent)?,
        TERMINAL => row(Kind::Terminal)?,
        AMENDED => row(Kind::Amended)?,
        TOTALS => Record::Totals(sequence, serde_json::from_slice(payload).ok()?),
        _ => return None,
    };
    Some((end, record))
}

impl Scan {
    /// The sequences of all records, in their order.
    pub fn sequences(&self) -> Vec<u64> {
        let rows = self.records.iter().map(|(sequence, _, _)| *sequence);
        let mut all: Vec<u64> = rows.chain(self.totals.iter().map(|(sequence, _)| *sequence)).collect();
        all.sort_unstable();
        all
    }
}

/// The rows that stand after a crash: every terminal row, as it was amended at last, and the intent of every attempt that
/// has none, each with what its record was called by. An attempt that was being left for the next one when the process died is not owed: the next
/// one is.
pub fn standing<T>(records: impl IntoIterator<Item = (T, Kind, Row)>) -> Vec<(T, Kind, Row)> {
    let mut order: Vec<Id> = Vec::new();
    let mut rows: HashMap<Id, (T, Kind, Row)> = HashMap::new();
    for (name, kind, row) in records {
        let id = id(&row);
        let before = rows.get(&id).map(|(_, kind, _)| *kind);
        if before.is_none() {
            order.push(id.clone());
        }
        let stands = match (before, kind) {
            (None, _) | (_, Kind::Amended) | (Some(Kind::Intent), Kind::Terminal) => true,
            (Some(_), Kind::Intent | Kind::Terminal) => false,
        };
        if stands {
            rows.insert(id, (name, kind, row));
        }
    }
    let mut last: HashMap<String, u32> = HashMap::new();
    for (request, attempt, _) in order.iter().filter(|(_, _, role)| *role != Role::Shadow) {
        let latest = last.entry(request.clone()).or_default();
        *latest = (*latest).max(*attempt);
    }
    order
        .into_iter()
        .filter_map(|id| {
            let (name, kind, mut row) = rows.remove(&id)?;
            let is_left = row.role != Role::Shadow && last.get(&row.request_id).is_some_and(|last| row.attempt < *last);
            if kind == Kind::Intent && is_left {
                (row.outcome, row.usage, row.billed) = (Outcome::FailedOver, Usage::default(), NanoUsd(0));
                row.usage_source = UsageSource::Counted;
            }
            Some((name, kind, row))
        })
        .collect()
}

/// What a row is unique by.
pub type Id = (String, u32, Role);

pub fn id(row: &Row) -> Id {
    (row.request_id.clone(), row.attempt, row.role)
}

#[cfg(test)]
pub mod tests {
    use super::super::super::row::Service;
    use super::super::totals::Sums;
    use super::*;
    use proptest::prelude::*;

    /// A row whose only interesting part is its id.
    pub fn row(id: &str) -> Row {
        Row {
            request_id: id.to_owned(),
            attempt: 0,
            role: Role::Primary,
            response_id: format!("chatcmpl-{id}"),
            trace_id: "0".repeat(32),
            started_ns: 1,
            ended_ns: 1,
            tenant: "default".into(),
            key_id: "k".into(),
            route: "assistant".into(),
            model: "glimmer-1".into(),
            variant: "glimmer-1".into(),
            provider: "glassgate".into(),
            op: "chat".into(),
            stream: false,
            cache: "none".into(),
            outcome: Outcome::Killed,
            usage: Usage::tokens(7, 64),
            usage_source: UsageSource::Reserved,
            billed: NanoUsd(9),
            provider_cost: NanoUsd(0),
            price_version: "v".into(),
            config_hash: "h".into(),
            user_id: None,
            unpriced: false,
            service_tier: None,
            images: 0,
        }
    }

    #[test]
    fn the_largest_totals_fit_the_room_that_is_kept_for_them() {
        for segments in [1, 1000] {
            let most = u64::MAX;
            let sums = Sums { rows: most, tokens: [most; 5], billed: most, provider_cost: most };
            let totals =
                Totals { log: i64::MIN, epoch: i64::MIN, sums, ended_below: most, segments: vec![most; segments] };
            assert!(encode_totals(most, &totals, &mut Vec::new()) as u64 <= totals_bytes_max(segments));
        }
    }

    #[test]
    fn the_longest_terminal_row_fits_the_room_its_intent_reserved() {
        let (mut intent, mut terminal) = (row("a"), row("a"));
        intent.usage = Usage::default();
        intent.billed = NanoUsd(0);
        intent.ended_ns = 0;
        intent.outcome = Outcome::Killed;
        let most = u64::MAX;
        terminal.usage = Usage { input: most, cache_read: most, cache_write: most, output: most, reasoning: most };
        terminal.billed = NanoUsd(most);
        terminal.provider_cost = NanoUsd(most);
        terminal.ended_ns = i64::MAX;
        terminal.cache = "coalesced".into();
        terminal.usage_source = UsageSource::Estimated;
        terminal.service_tier = Some(Service::Priority);
        for outcome in Outcome::ALL {
            terminal.outcome = outcome;
            let mut bytes = Vec::new();
            let reserved = slot_bytes(encode(0, Kind::Intent, &intent, &mut bytes));
            let used = encode(1, Kind::Terminal, &terminal, &mut bytes) as u64;
            assert!(used <= reserved, "{outcome:?} needs {used}, has {reserved}");
        }
    }

    proptest! {
        #[test]
        fn a_log_cut_anywhere_gives_exactly_the_records_before_the_cut(count in 1usize..6, cut in 0.0f64..1.0) {
            let mut bytes = Vec::new();
            let mut ends = Vec::new();
            for i in 0..count {
                encode(i as u64, Kind::Terminal, &row(&format!("r{i}")), &mut bytes);
                ends.push(bytes.len());
            }
            let at = (bytes.len() as f64 * cut) as usize;
            let found = scan(&bytes[..at]);
            let whole = ends.iter().filter(|end| **end <= at).count();
            prop_assert_eq!(found.records.len(), whole);
            prop_assert_eq!(found.damaged_bytes, 0);
            prop_assert_eq!(found.torn_bytes as usize, at - ends[..whole].last().copied().unwrap_or(0));
        }

        #[test]
        fn a_flipped_byte_loses_only_its_own_record_and_is_reported(flip in 1u8..=255, which in 0.0f64..1.0) {
            let mut bytes = Vec::new();
            for i in 0..4 { encode(i, Kind::Intent, &row(&format!("r{i}")), &mut bytes); }
            let index = ((bytes.len() - 1) as f64 * which) as usize;
            bytes[index] ^= flip;
            let found = scan(&bytes);
            prop_assert_eq!(found.records.len(), 3);
            prop_assert!(found.damaged_bytes + found.torn_bytes > 0);
        }

        #[test]
        fn any_bytes_at_all_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(scan(&bytes).records.is_empty());
        }
    }
}
