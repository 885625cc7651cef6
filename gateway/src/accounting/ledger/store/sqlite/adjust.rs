//! Prices rows again, beside a gateway that may be writing.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, Transaction, params, params_from_iter, types::Value};

use super::super::adjust::{self, Adjuster, Adjustment, COLUMNS_OF_ONE, Cursor, Differences, Run, USER_AT, signed};
use super::super::{StoreError, adjust::decide};
use super::{begin, migrate, read};
use crate::accounting::reprice::{Booked, Standing};

/// The file, open to be adjusted.
pub struct SqliteAdjuster(Connection);

impl SqliteAdjuster {
    /// # Errors
    /// When the file cannot be written, or its tables are another version's.
    pub fn open(path: &Path) -> Result<SqliteAdjuster, StoreError> {
        let open = || {
            let db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(5))?;
            // What the record of changes says was done must be there after a power cut.
            db.execute_batch("PRAGMA synchronous = FULL")?;
            migrate::check(&db)?;
            Ok(SqliteAdjuster(db))
        };
        open().map_err(|error: StoreError| StoreError(format!("{}: {error}", path.display())))
    }
}

impl Adjuster for SqliteAdjuster {
    fn page(
        &mut self,
        from: &Cursor,
        run: &Run<'_>,
        judge: &mut dyn FnMut(&Booked) -> Option<Standing>,
    ) -> Result<Option<Cursor>, StoreError> {
        let transaction = begin(&mut self.0)?;
        let (started_ns, request, attempt, role) = from.parts();
        let rows = {
            let mut query = transaction.prepare_cached(&adjust::page("0"))?;
            let rows = query.query_map(params![started_ns, request, attempt, role, run.past_ns], |row| {
                Ok((read::booked(row)?, 0))
            })?;
            rows.collect::<Result<Vec<_>, _>>()?
        };
        let (adjustments, differences) = decide(&rows, judge);
        insert(&transaction, run, &adjustments)?;
        shift(&transaction, &differences)?;
        transaction.commit()?;
        Ok(adjust::next(&rows))
    }
}

fn insert(transaction: &Transaction<'_>, run: &Run<'_>, adjustments: &[Adjustment]) -> rusqlite::Result<()> {
    let places = vec!["?"; COLUMNS_OF_ONE.len()].join(", ");
    let sql = format!("INSERT INTO adjustment ({}) VALUES ({places})", COLUMNS_OF_ONE.join(", "));
    let mut insert = transaction.prepare_cached(&sql)?;
    for Adjustment { id: (request, attempt, role), number, before, after } in adjustments {
        insert.execute(params![
            request,
            attempt,
            role.as_str(),
            number,
            run.at_ns,
            run.reason,
            signed(before.billed.0),
            signed(after.billed.0),
            signed(before.provider_cost.0),
            signed(after.provider_cost.0),
            before.price_version,
            after.price_version,
            before.unpriced,
            after.unpriced,
        ])?;
    }
    Ok(())
}

fn shift(transaction: &Transaction<'_>, differences: &Differences<'_>) -> Result<(), StoreError> {
    let mut shift = transaction.prepare_cached(&adjust::shift(""))?;
    for ((hour, _, group), by) in differences {
        let mut shifted = 0;
        // A user without a sum of their own shares one.
        for user in [group[USER_AT], "other"] {
            if shifted == 0 {
                let group = group.iter().enumerate().map(|(at, part)| if at == USER_AT { user } else { part });
                let numbers = by.iter().chain([hour]).map(|number| Value::Integer(*number));
                let group = group.map(|part| Value::Text(part.to_owned()));
                shifted = shift.execute(params_from_iter(numbers.chain(group)))?;
            }
        }
        if shifted == 0 {
            return Err(adjust::without_sum(*hour));
        }
    }
    Ok(())
}
