//! The table of judgements.

use tokio_postgres::types::ToSql;

use super::super::StoreError;
use super::super::feedback::{self as shared, Last, SHARED_DIGITS};
use super::storable;
use crate::accounting::feedback::{Answered, Change, Judgement, Of, Verdict};
use crate::database::postgres::Session;

/// A question of both stores with its places as Postgres has them.
pub(super) fn placed(sql: &str) -> String {
    sql.replace('?', "$")
}

/// Writes a judgement down, if there is exactly one answer that it can be about.
pub(super) async fn judge(session: &mut Session, judgement: &Judgement) -> Result<Verdict, StoreError> {
    let answered = match shared::one(found(session, judgement).await?) {
        Ok(answered) => answered,
        Err(verdict) => return Ok(verdict),
    };
    let request = &answered.request_id;
    let change = match last(session, request, judgement).await? {
        None if !shared::has_room(names(session, request, judgement).await?) => return Ok(Verdict::TooManyNames),
        None => {
            write(session, shared::INSERT, request, judgement).await?;
            Change::Created
        }
        Some(last) => shared::change(last, judgement, write(session, shared::UPDATE, request, judgement).await?),
    };
    Ok(Verdict::Taken { answered, change })
}

async fn found(session: &mut Session, Judgement { of, tenant, .. }: &Judgement) -> Result<Vec<Answered>, StoreError> {
    let rows = match of {
        Of::Response(id) => {
            let Some(request_id) = shared::request_of(id) else { return Ok(Vec::new()) };
            session.query(&placed(&shared::by_response()), &[&request_id, id, tenant]).await?
        }
        Of::Trace(id) => {
            let digits = &id[..SHARED_DIGITS.min(id.len())];
            session.query(&placed(&shared::by_trace()), &[id, &digits, tenant]).await?
        }
    };
    let answered = |row: &tokio_postgres::Row| Answered {
        request_id: row.get(0),
        response_id: row.get(1),
        route: row.get(2),
        variant: row.get(3),
    };
    Ok(rows.iter().map(answered).collect())
}

async fn last(session: &mut Session, request: &str, judgement: &Judgement) -> Result<Option<Last>, StoreError> {
    let rows = session.query(&placed(shared::LAST), &[&request, &judgement.name, &judgement.key_id]).await?;
    Ok(rows.first().map(|row| Last {
        score: shared::score(row.get(0), row.get(1), row.get(2)),
        created_ns: row.get(3),
        updated_ns: row.get(4),
    }))
}

async fn names(session: &mut Session, request: &str, judgement: &Judgement) -> Result<i64, StoreError> {
    let rows = session.query(&placed(shared::NAMES), &[&request, &judgement.key_id]).await?;
    Ok(rows.first().map_or(0, |row| row.get(0)))
}

/// Gives how many rows changed.
async fn write(session: &mut Session, sql: &str, request: &str, judgement: &Judgement) -> Result<u64, StoreError> {
    let (number, label) = shared::columns(&judgement.score);
    let comment = judgement.comment.as_deref().map(storable);
    let values: [&(dyn ToSql + Sync); 8] = [
        &request,
        &judgement.name,
        &judgement.key_id,
        &judgement.score.kind(),
        &number,
        &label,
        &comment,
        &judgement.at_ns,
    ];
    session.execute(&placed(sql), &values).await
}
