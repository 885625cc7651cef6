//! Where rows are kept for good, and asked for: SQLite, a file of one gateway, or Postgres, which several share. Another
//! store is a folder beside theirs and a line in `Database`.

pub mod adjust;
pub mod feedback;
pub mod hours;
pub mod months;
pub mod postgres;
mod sql;
pub mod sqlite;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::core::NanoUsd;
use super::super::feedback::{Judgement, Verdict};
use super::super::reprice::Booked;
use super::super::row::{Row, Sum};
use super::totals::Sums;
pub use crate::database::StoreError;
use adjust::Adjuster;
use feedback::{Answers, Judged};
use months::Month;

/// What became of a row that was shipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    New,
    /// It was there already, the very same.
    There,
    /// It was there already and says something else. It stays as it is.
    Different,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Shipped {
    /// In the order of the rows.
    pub fates: Vec<Fate>,
    /// In the order of the judgements.
    pub verdicts: Vec<Verdict>,
}

/// A store as the log sees it. Every call blocks, and either does all or nothing.
pub trait Store: Send {
    /// Takes rows, their hourly sums, and then judgements, in one transaction: a judgement finds every row that came before
    /// it, and a row that was there already is counted once.
    ///
    /// # Errors
    /// When it cannot be written.
    fn ship(&mut self, rows: &[&Row], judgements: &[&Judgement]) -> Result<Shipped, StoreError>;

    /// Makes all that was shipped survive a power cut.
    ///
    /// # Errors
    /// When it cannot.
    fn sync(&mut self) -> Result<(), StoreError>;

    /// The count of the log, if it has one, and what came from it since that began.
    ///
    /// # Errors
    /// When it cannot be read.
    fn counts(&mut self) -> Result<Option<(i64, Sums)>, StoreError>;

    /// The log's count `epoch` begins with what is here now.
    ///
    /// # Errors
    /// When it cannot be written.
    fn count_from(&mut self, epoch: i64) -> Result<(), StoreError>;

    /// Lets go of rows from before a month, and what was said of them; their hourly sums stay. A row that comes later than
    /// that is as good as there. Gives whether there is more to do, so that others get their turn.
    ///
    /// # Errors
    /// When it cannot be written now.
    fn keep_from(&mut self, month: Month) -> Result<bool, StoreError>;

    /// The month of the latest request.
    ///
    /// # Errors
    /// When it cannot be read.
    fn latest(&mut self) -> Result<Option<Month>, StoreError>;
}

/// Opens the store for writing; asked again and again until it can.
pub type Opener = Box<dyn Fn() -> Result<Box<dyn Store>, StoreError> + Send>;

/// Which store a ledger has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// This file.
    Sqlite(PathBuf),
    Postgres(Arc<postgres::Target>),
}

impl Database {
    /// The store of a data folder whose gateway names no other.
    pub fn of(data_dir: &Path) -> Database {
        Database::Sqlite(data_dir.join("ledger.sqlite"))
    }

    /// For the log of this name.
    pub fn opener(&self, log: i64) -> Opener {
        match self.clone() {
            Database::Sqlite(path) => Box::new(move || Ok(Box::new(sqlite::Sqlite::open(&path)?))),
            Database::Postgres(target) => Box::new(move || Ok(Box::new(postgres::Postgres::open(&target, log)?))),
        }
    }

    /// To be asked.
    ///
    /// # Errors
    /// When there is none, or it was written by another version.
    pub fn books(&self) -> Result<Box<dyn Books>, StoreError> {
        Ok(match self {
            Database::Sqlite(path) => Box::new(sqlite::read::SqliteBooks::open(path)?),
            Database::Postgres(target) => Box::new(postgres::read::PostgresBooks::open(target)?),
        })
    }

    /// To be adjusted.
    ///
    /// # Errors
    /// When there is none, or it was written by another version.
    pub fn adjuster(&self) -> Result<Box<dyn Adjuster>, StoreError> {
        Ok(match self {
            Database::Sqlite(path) => Box::new(sqlite::adjust::SqliteAdjuster::open(path)?),
            Database::Postgres(target) => Box::new(postgres::adjust::PostgresAdjuster::open(target)?),
        })
    }
}

/// The rows of a batch that were not there before.
fn new<'r>(rows: &[&'r Row], fates: &[Fate]) -> Vec<&'r Row> {
    rows.iter().zip(fates).filter(|(_, fate)| **fate == Fate::New).map(|(row, _)| *row).collect()
}

/// What spending can be summed by. A closed set, so that no caller's text becomes SQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum By {
    Key,
    Tenant,
    User,
    Route,
    Model,
    Variant,
    Outcome,
    /// By the periods that are asked for.
    Day,
}

impl By {
    /// Its column in the table of rows and in that of hours.
    fn column(self) -> &'static str {
        match self {
            By::Key => "key_id",
            By::Tenant => "tenant",
            By::User => "user_id",
            By::Route => "route",
            By::Model => "model",
            By::Variant => "variant",
            By::Outcome => "outcome",
            By::Day => "period",
        }
    }
}

/// A span of time with a name. `past_ns` is the first nanosecond that is not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Period {
    pub name: String,
    pub first_ns: i64,
    pub past_ns: i64,
}

/// What one group spent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spend {
    /// As asked for, in that order.
    pub by: Vec<String>,
    pub requests: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub billed: NanoUsd,
    pub provider_cost: NanoUsd,
}

/// What feedback can be grouped by.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum GroupBy {
    Key,
    Tenant,
    Route,
    Model,
    Variant,
    Outcome,
}

impl GroupBy {
    pub fn column(self) -> &'static str {
        match self {
            GroupBy::Key => "key_id",
            GroupBy::Tenant => "tenant",
            GroupBy::Route => "route",
            GroupBy::Model => "model",
            GroupBy::Variant => "variant",
            GroupBy::Outcome => "outcome",
        }
    }
}

/// A store as people see it: one moment of it, for as long as it is held. The gateway may be writing meanwhile.
pub trait Books {
    /// What limits have counted of requests that began at `first_ns` or later, and before `past_ns`. What came from a cache
    /// was nobody's tokens, and what was released nobody's request. `log`: only what came from it; a file has one only.
    ///
    /// # Errors
    /// As all of these: when it cannot be read.
    fn spent_between(&self, first_ns: i64, past_ns: i64, log: Option<i64>) -> Result<Vec<Sum>, StoreError>;

    /// Spending in each period as it counts today, the dearest first; where days are asked for, by them.
    fn spend(&self, by: &[By], periods: &[Period]) -> Result<Vec<Spend>, StoreError>;

    /// The hour of the first row, since the Unix epoch.
    fn first_hour(&self) -> Result<Option<i64>, StoreError>;

    /// Rows that began in a span of time, by when they began, until `each` wants no more.
    fn rows(&self, first_ns: i64, past_ns: i64, each: &mut dyn FnMut(Booked) -> bool) -> Result<(), StoreError>;

    /// One row by what it is unique by.
    fn row(&self, id: &super::wal::Id) -> Result<Option<Row>, StoreError>;

    /// What rows of a log, of requests that began at `since_ns` or later, sum up to. (A file has one log only.)
    fn sums_of(&self, log: i64, since_ns: i64) -> Result<Sums, StoreError>;

    /// The count of a log, and what was here of it when that began.
    fn counted_from(&self, log: i64) -> Result<Option<(i64, Sums)>, StoreError>;

    /// Ids of requests whose rows are kept are not before this; `None` if all are.
    fn kept_from(&self) -> Result<Option<String>, StoreError>;

    /// What hours of a log sum up to, also those whose rows are not kept.
    fn sums_of_hours(&self, log: i64) -> Result<Sums, StoreError>;

    /// Groups whose hourly sums are not their rows', in words, of hours whose rows are all kept.
    fn uneven_hours(&self, most: usize) -> Result<Vec<String>, StoreError>;

    /// Adjustments that do not begin with what their rows say, and hours that are adjusted by something else, in words.
    fn uneven_adjustments(&self, most: usize) -> Result<Vec<String>, StoreError>;

    /// Requests that do not have exactly one row that ends them.
    fn requests_without_one_end(&self, most: usize) -> Result<Vec<String>, StoreError>;

    /// What became of requests since `since_ns`, by group.
    fn answers(&self, by: GroupBy, since_ns: i64) -> Result<Vec<Answers>, StoreError>;

    /// What was said of answers that began at `since_ns` or later, by group and name.
    fn judged(&self, by: GroupBy, since_ns: i64) -> Result<BTreeMap<(String, String), Judged>, StoreError>;
}

/// What is said of a request with so many ends.
fn ends(request: &str, count: i64) -> String {
    format!("request {request} has {count} rows that end it")
}

/// Whether a row comes when those of its time are not kept any more. Nobody knows then whether it was there.
fn is_gone(row: &Row, kept_from: Option<&str>) -> bool {
    kept_from.is_some_and(|first| row.request_id.as_str() < first)
}
