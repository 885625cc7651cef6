//! Is the ledger whole? What its log says, its rows, their hourly sums, and what metrics told, held against each other.
//!
//! A gateway may be writing meanwhile: the log is read before the store is and again after it, and what is true of it
//! lies between the two.

use std::collections::{HashMap, HashSet};

use super::super::row::{COLUMNS, Row};
use super::disk::Disk;
use super::recovery::Reading;
use super::store::months::whole_from_ns;
use super::store::{Books, StoreError};
use super::totals::Sums;
use super::wal;

/// Differences of one leg that are told.
const TOLD_MAX: usize = 20;

/// One thing that was checked.
#[derive(Debug)]
pub struct Leg {
    pub name: &'static str,
    /// What was looked at.
    pub told: String,
    pub differences: Vec<String>,
}

/// What metrics said before anything else was read: sums of one process, which the ledger must hold at the least.
#[derive(Clone, Copy, Debug)]
pub struct Scrape {
    /// Unix nanosecond in which the process had not begun yet.
    pub since_ns: i64,
    pub sums: Sums,
}

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the ledger's log cannot be read: {0}")]
    Log(#[from] std::io::Error),
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// Reads everything and compares it.
///
/// # Errors
/// When log or store cannot be read.
pub fn verify(
    disk: &dyn Disk,
    books: impl FnOnce() -> Result<Box<dyn Books>, StoreError>,
    scrape: Option<Scrape>,
) -> Result<Vec<Leg>, VerifyError> {
    let before = Reading::of(disk)?;
    let books = books()?;
    let after = Reading::of(disk)?;
    let mut legs = vec![frames(&before), segments(&before, &after)];

    let low = before.sums();
    // What the log has that the store does not, yet; and what a recovery gave an end that the log does not count, yet.
    let (mut waiting, mut uncounted) = (Vec::new(), Sums::default());
    let mut standing = Leg::new("rows of the log", String::new());
    let mut compared = 0;
    for ((_, is_cut_off), row) in before.standing() {
        match books.row(&wal::id(&row))? {
            Some(there) if is_cut_off && there == row => uncounted.add(&row),
            _ if is_cut_off => {}
            Some(there) if there == row => compared += 1,
            Some(there) => standing.differs(difference(&row, &there)),
            None => waiting.push(row),
        }
    }
    standing.told = format!("{compared} are in the store as the log has them, {} wait for it", waiting.len());
    legs.push(standing);

    let mut ends = Leg::new("one end a request", "each request's rows".to_owned());
    ends.differences = books.requests_without_one_end(TOLD_MAX)?;
    legs.push(ends);
    let mut hours = Leg::new("hourly sums", "each group of each hour".to_owned());
    hours.differences = books.uneven_hours(TOLD_MAX)?;
    legs.push(hours);
    let mut adjustments =
        Leg::new("adjustments", "each begins with what its row says, and hours sum them up".to_owned());
    adjustments.differences = books.uneven_adjustments(TOLD_MAX)?;
    legs.push(adjustments);

    let log = after.log();
    let kept_from = books.kept_from()?;
    // Rows that are not kept are told of by their hours; those of the others were held against their rows.
    let here = match &kept_from {
        None => books.sums_of(log, i64::MIN)?,
        Some(_) => books.sums_of_hours(log)?,
    };
    legs.push(totals(low, after.sums(), books.counted_from(log)?, |base| {
        here.plus(&Sums::of(&waiting)).since(&base).since(&uncounted)
    }));
    let is_kept = |since_ns: i64| kept_from.as_deref().is_none_or(|first| since_ns >= whole_from_ns(first));
    if let Some(scrape) = scrape.filter(|scrape| is_kept(scrape.since_ns)) {
        let late = waiting.iter().filter(|row| row.started_ns >= scrape.since_ns);
        let here = books.sums_of(log, scrape.since_ns)?.plus(&Sums::of(late));
        legs.push(metrics(&scrape, &here));
    }
    Ok(legs)
}

impl Leg {
    fn new(name: &'static str, told: String) -> Leg {
        Leg { name, told, differences: Vec::new() }
    }

    fn differs(&mut self, what: String) {
        if self.differences.len() < TOLD_MAX {
            self.differences.push(what);
        }
    }

    pub fn is_whole(&self) -> bool {
        self.differences.is_empty()
    }
}

fn frames(log: &Reading) -> Leg {
    let mut leg = Leg::new("frames of the log", format!("{} segments", log.segments.len()));
    for (number, segment) in log.segments.iter().filter(|(_, segment)| segment.damaged_bytes > 0) {
        leg.differs(format!("segment {number}: {} bytes between its records are none", segment.damaged_bytes));
    }
    leg
}

/// A segment that ended between the two readings is missing in one of them only.
fn segments(before: &Reading, after: &Reading) -> Leg {
    let records: usize = before.segments.values().map(|segment| segment.sequences.len()).sum();
    let mut leg = Leg::new("sequence of the log", format!("{records} records"));
    let still: HashSet<u64> = after.missing.iter().copied().collect();
    for number in before.missing.iter().filter(|number| still.contains(number)) {
        leg.differs(format!("segment {number} is missing, and the log says that it must be there"));
    }
    if before.segments.is_empty() && after.segments.is_empty() {
        leg.differs("there is no log at all, and the store has one".to_owned());
    }
    let mut last: Option<(u64, u64)> = None;
    for (number, segment) in &before.segments {
        let follows = last.filter(|(before, _)| before + 1 == *number).map(|(_, last)| last);
        let mut at = follows;
        for sequence in &segment.sequences {
            if at.is_some_and(|at| at + 1 != *sequence) {
                leg.differs(format!("segment {number}: record {sequence} does not follow the one before"));
            }
            at = Some(*sequence);
        }
        last = segment.sequences.last().map(|last| (*number, *last));
    }
    leg
}

fn difference(log: &Row, store: &Row) -> String {
    let cells = COLUMNS.iter().zip(log.cells().into_iter().zip(store.cells())).filter(|(_, (log, store))| log != store);
    let cells = cells.map(|((name, _), (log, store))| format!("{name} is {store}, and {log} in the log"));
    let row = format!("request {} attempt {} {}", log.request_id, log.attempt, log.role.as_str());
    format!("{row}: {}", cells.collect::<Vec<_>>().join("; "))
}

/// The log's own count against the store's rows. `since` gives those that came after a count began.
fn totals(
    low: Option<(i64, Sums)>,
    high: Option<(i64, Sums)>,
    counted_from: Option<(i64, Sums)>,
    since: impl FnOnce(Sums) -> Sums,
) -> Leg {
    let mut leg = Leg::new("control totals", String::new());
    let (low, high, (epoch, base)) = match (low, high, counted_from) {
        (Some((low_of, low)), Some((high_of, high)), Some(counted)) if low_of == counted.0 && high_of == low_of => {
            (low, high, counted)
        }
        (_, _, Some((super::NO_COUNT, _))) => {
            leg.differs(
                "the log failed in this life of the gateway and counts no more; a restart begins anew".to_owned(),
            );
            return leg;
        }
        _ => {
            leg.differs("log and store do not count from the same moment: one of them was replaced".to_owned());
            return leg;
        }
    };
    let here = since(base);
    let began = time::OffsetDateTime::from_unix_timestamp(epoch / 1_000_000_000);
    let began = began.map_or_else(|_| epoch.to_string(), |began| began.date().to_string());
    leg.told = format!("{} rows since {began}", here.rows);
    for ((name, here), ((_, low), (_, high))) in here.named().into_iter().zip(low.named().into_iter().zip(high.named()))
    {
        if here < low || here > high {
            leg.differs(format!("{name}: the log counted {low}, the ledger holds {here}"));
        }
    }
    leg
}

fn metrics(scrape: &Scrape, here: &Sums) -> Leg {
    let mut leg = Leg::new("metrics", format!("{} requests since the gateway's start", scrape.sums.rows));
    for ((name, told), (_, here)) in scrape.sums.named().into_iter().zip(here.named()) {
        if told > here {
            leg.differs(format!("{name}: metrics counted {told}, the ledger holds {here}"));
        }
    }
    leg
}

impl Scrape {
    /// Reads what `/metrics` says.
    ///
    /// # Errors
    /// When it does not say since when.
    pub fn parse(text: &str) -> Result<Scrape, &'static str> {
        let mut sums: HashMap<&str, f64> = HashMap::new();
        let mut since = None;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let kind = labels.split("kind=\"").nth(1).and_then(|rest| rest.split('"').next());
            match name {
                "process_start_time_seconds" => since = Some(value),
                "gateway_tokens_total" => *sums.entry(kind.unwrap_or_default()).or_default() += value,
                _ => *sums.entry(name).or_default() += value,
            }
        }
        let whole = |name: &str| sums.get(name).map_or(0, |sum| sum.round() as u64);
        let nano = |name: &str| sums.get(name).map_or(0, |sum| (sum * 1e9).round() as u64);
        let since = since.ok_or("it has no process_start_time_seconds: are these metrics of a gateway?")?;
        Ok(Scrape {
            since_ns: (since * 1e9) as i64,
            sums: Sums {
                rows: whole("gateway_settled_requests_total"),
                tokens: ["input", "cache_read", "cache_write", "output", "reasoning"].map(whole),
                billed: nano("gateway_cost_usd_total"),
                provider_cost: nano("gateway_provider_cost_usd_total"),
            },
        })
    }
}
