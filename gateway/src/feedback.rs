//! `POST /v1/feedback`: what a client says of an answer → a row beside the answer's own in the ledger.

use std::sync::Arc;
use std::time::Duration;

use crate::accounting::feedback::{Judgement, Of, Verdict};
use crate::api::feedback::{Feedback, taken};
use crate::app::{App, Phase, Snapshot};
use crate::exchange::Exchange;
use crate::invoke::{enter, require_json};
use crate::ports::Inbound;
use crate::refusal::Refusal;

/// The longest comment fits, also where every character of it is escaped.
const BODY_BYTES_MAX: usize = 32 << 10;
/// A store that takes longer is said to be unavailable. It may take the judgement all the same; sent again, it counts once.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// Takes one judgement and returns the body that says so. The row is durable by then.
///
/// # Errors
/// The refusal, from whichever step said no.
pub async fn take(
    app: &App,
    snapshot: &Snapshot,
    inbound: &mut impl Inbound,
    exchange: &mut Exchange,
) -> Result<Vec<u8>, Refusal> {
    let caller = enter(app, snapshot, inbound, exchange).await?;
    app.admission.knock_to_judge(&caller, &snapshot.config.gateway.limits)?;
    exchange.mark(|record, now| record.marks.knocked = Some(now));
    if app.phase() >= Phase::Draining {
        return Err(Refusal::Draining);
    }
    require_json(inbound)?;
    let body = inbound.read_body(BODY_BYTES_MAX).await?;
    exchange.mark(|record, now| (record.bytes_in, record.marks.body_read) = (body.len() as u64, Some(now)));
    let Feedback { of, name, score, comment } = Feedback::parse(&body)?;
    let param = match of {
        Of::Response(_) => "response_id",
        Of::Trace(_) => "trace_id",
    };
    let judgement = Arc::new(Judgement {
        of,
        name,
        score,
        comment,
        tenant: caller.tenant().to_owned(),
        key_id: caller.key_id().to_owned(),
        at_ns: app.clock.now_ns(),
    });

    let verdict = app.ledger.judge(judgement.clone()).ok_or(Refusal::FeedbackUnavailable)?;
    let verdict = tokio::select! {
        biased;
        verdict = verdict => verdict.map_err(|_| Refusal::FeedbackUnavailable)?,
        why = inbound.gone() => return Err(why),
        () = tokio::time::sleep(STORE_PATIENCE) => return Err(Refusal::FeedbackUnavailable),
    };
    match verdict {
        Verdict::Taken { answered, change } => {
            let id = judgement.id(&answered.request_id);
            let body = taken(&id, &answered.response_id, &judgement.name, &judgement.score, &change);
            // The answer that is meant: whoever looks for it finds what was said of it.
            exchange.note(|record| record.response_id = Some(answered.response_id));
            Ok(body)
        }
        Verdict::NoSuchAnswer => Err(Refusal::UnknownAnswer { param }),
        Verdict::SeveralAnswers => Err(Refusal::SeveralAnswers),
        Verdict::TooManyNames => Err(Refusal::TooManyNames),
    }
}
