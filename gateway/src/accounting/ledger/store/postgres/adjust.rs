//! Prices rows again, beside gateways that may be writing.

use tokio_postgres::types::ToSql;

use super::super::StoreError;
use super::super::adjust::{
    self, Adjuster, Adjustment, COLUMNS_OF_ONE, Cursor, Differences, Run, USER_AT, decide, signed,
};
use super::feedback::placed;
use super::{migrate, months, read};
use crate::accounting::reprice::{Booked, Standing};
use crate::database::postgres::{Link, STATEMENT_MAX, Session, Target};

/// Of the lock under which a page is adjusted: "glassprc" in ASCII.
const LOCK: i64 = 0x676c_6173_7370_7263;

/// The database, open to be adjusted.
pub struct PostgresAdjuster(Link);

impl PostgresAdjuster {
    /// # Errors
    /// When it cannot be reached, or its tables are another version's.
    pub fn open(target: &Target) -> Result<PostgresAdjuster, StoreError> {
        let mut link = Link::open(target, STATEMENT_MAX)?;
        link.run(async |session| {
            migrate::check(session).await?;
            make_months(session).await
        })?;
        Ok(PostgresAdjuster(link))
    }
}

impl Adjuster for PostgresAdjuster {
    fn page(
        &mut self,
        from: &Cursor,
        run: &Run<'_>,
        judge: &mut dyn FnMut(&Booked) -> Option<Standing>,
    ) -> Result<Option<Cursor>, StoreError> {
        self.0.run(async |session| {
            // Whoever else does it waits, and reads what this one has done.
            session.batch(&format!("BEGIN; SELECT pg_advisory_xact_lock({LOCK})")).await?;
            let (started_ns, request, attempt, role) = from.parts();
            let page = placed(&adjust::page("log"));
            let rows = session.query(&page, &[&started_ns, &request, &attempt, &role, &run.past_ns]).await?;
            let log_at = adjust::STANDING_AT + 5;
            let rows = rows.iter().map(|row| Ok((read::booked(row)?, row.get(log_at))));
            let rows = rows.collect::<Result<Vec<(Booked, i64)>, StoreError>>()?;
            let (adjustments, differences) = decide(&rows, judge);
            insert(session, run, &adjustments).await?;
            shift(session, &differences).await?;
            session.batch("COMMIT").await?;
            Ok(adjust::next(&rows))
        })
    }
}

/// Makes the partitions that adjustments of the months need of which there are rows.
async fn make_months(session: &mut Session) -> Result<(), StoreError> {
    session.batch("BEGIN").await?;
    migrate::lock(session).await?;
    for month in months(session).await? {
        let (first, past) = (month.first_id(), month.next().first_id());
        session
            .batch(&format!(
                "CREATE TABLE IF NOT EXISTS adjustment_{month} PARTITION OF adjustment FOR VALUES FROM ('{first}') TO ('{past}')"
            ))
            .await?;
    }
    session.batch("COMMIT").await
}

async fn insert(session: &mut Session, run: &Run<'_>, adjustments: &[Adjustment]) -> Result<(), StoreError> {
    if adjustments.is_empty() {
        return Ok(());
    }
    let texts = |of: fn(&Adjustment) -> &str| adjustments.iter().map(of).collect::<Vec<&str>>();
    let numbers = |of: fn(&Adjustment) -> i64| adjustments.iter().map(of).collect::<Vec<i64>>();
    let (requests, roles) = (texts(|one| &one.id.0), texts(|one| one.id.2.as_str()));
    let versions = [texts(|one| &one.before.price_version), texts(|one| &one.after.price_version)];
    let [attempts, places] = [numbers(|one| one.id.1.into()), numbers(|one| one.number)];
    let billed = [numbers(|one| signed(one.before.billed.0)), numbers(|one| signed(one.after.billed.0))];
    let cost = [numbers(|one| signed(one.before.provider_cost.0)), numbers(|one| signed(one.after.provider_cost.0))];
    let unpriced = [numbers(|one| one.before.unpriced.into()), numbers(|one| one.after.unpriced.into())];
    let values: [&(dyn ToSql + Sync); COLUMNS_OF_ONE.len()] = [
        &requests,
        &attempts,
        &roles,
        &places,
        &run.at_ns,
        &run.reason,
        &billed[0],
        &billed[1],
        &cost[0],
        &cost[1],
        &versions[0],
        &versions[1],
        &unpriced[0],
        &unpriced[1],
    ];
    let sql = format!(
        "INSERT INTO adjustment ({})
         SELECT request, attempt, role, number, $5::bigint, $6::text, b0, b1, c0, c1, v0, v1, u0, u1
         FROM UNNEST($1::text[], $2::bigint[], $3::text[], $4::bigint[], $7::bigint[], $8::bigint[], $9::bigint[],
                     $10::bigint[], $11::text[], $12::text[], $13::bigint[], $14::bigint[])
             AS fresh (request, attempt, role, number, b0, b1, c0, c1, v0, v1, u0, u1)",
        COLUMNS_OF_ONE.join(", ")
    );
    session.execute(&sql, &values).await.map(drop)
}

async fn shift(session: &mut Session, differences: &Differences<'_>) -> Result<(), StoreError> {
    let sql = placed(&adjust::shift("AND log = ?13"));
    for ((hour, log, group), by) in differences {
        let mut shifted = 0;
        // A user without a sum of their own shares one.
        for user in [group[USER_AT], "other"] {
            if shifted == 0 {
                let mut group = *group;
                group[USER_AT] = user;
                let mut values: Vec<&(dyn ToSql + Sync)> = vec![&by[0], &by[1], hour];
                values.extend(group.iter().map(|part| part as &(dyn ToSql + Sync)));
                values.push(log);
                shifted = session.execute(&sql, &values).await?;
            }
        }
        if shifted == 0 {
            return Err(adjust::without_sum(*hour));
        }
    }
    Ok(())
}
