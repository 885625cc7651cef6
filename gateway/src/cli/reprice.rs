//! `glassgate ledger reprice`: rows that were priced wrongly, or not at all, by today's prices.

use clap::Args;
use jiff::Timestamp;
use serde_json::json;

use super::{Outcome, Place, actor, ledger, text, when};
use crate::accounting::core::NanoUsd;
use crate::accounting::ledger::store::adjust::{Cursor, Run};
use crate::accounting::ledger::store::{Books, By, Database, Period, StoreError};
use crate::accounting::reprice::{Report, Repricer, Sum, Which};
use crate::control::Change;
use crate::ports::{Clock as _, SystemClock};

#[derive(Args)]
#[command(after_help = "\
Rows stay as they were written. What one costs otherwise is appended as an adjustment, which `spend`, `feedback`
and `export` (…_now) count from then on, and `verify` checks. Interrupted, it is done as far as it came: run it again. What is
done already is left alone, also where several gateways share the ledger and do it at once. `glassgate audit` says who did.

Clients were told what a request cost, and limits have counted that: neither changes. Budgets begin with what was billed
then, metrics keep it, too. Nor can this bring back what a strict budget cut off, price rows that `storage.retain` has let
go, or what a device of our own cost us: rows do not hold its time. It says how many there are.")]
pub struct Options {
    #[command(flatten)]
    asked: when::Between,
    /// Only rows of this model
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Only rows of this route
    #[arg(long, value_name = "NAME")]
    route: Option<String>,
    /// Only rows of this tenant
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    /// Only rows of models that had no price
    #[arg(long)]
    only_unpriced: bool,
    /// Do it, instead of showing what it would do
    #[arg(long, requires = "reason")]
    apply: bool,
    /// Why, for the record; every adjustment says it
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: Option<String>,
}

const REASON_CHARS_MAX: usize = 256;

fn reason(text: &str) -> Result<String, String> {
    let is_fine = (1..=REASON_CHARS_MAX).contains(&text.chars().count()) && !text.contains(char::is_control);
    if is_fine { Ok(text.to_owned()) } else { Err(format!("must be 1 to {REASON_CHARS_MAX} characters on one line")) }
}

pub fn run(place: &Place, store: &Database, options: &Options) -> Outcome {
    let config = place.config()?;
    let when::Times { since, until, .. } = options.asked.read(Timestamp::now())?;
    let (first_ns, past_ns) = (since.map_or(0, when::nanoseconds), until.map_or(i64::MAX, when::nanoseconds));
    let Options { model, route, tenant, only_unpriced, .. } = options;
    let (model, route, tenant) = (model.clone(), route.clone(), tenant.clone());
    let which = Which { model, route, tenant, only_unpriced: *only_unpriced };
    let version = config.prices.version.as_str();
    let repricer =
        || Repricer { which: which.clone(), prices: &config.prices.models, version, report: Report::default() };

    let mut planned = repricer();
    let books = ledger(store)?;
    books
        .rows(first_ns, past_ns, &mut |booked| {
            planned.judge(&booked);
            true
        })
        .map_err(text)?;
    let gone = gone(&*books, &which, first_ns, past_ns, &planned.report).map_err(text)?;
    drop(books);
    let planned = planned.report;
    show(&planned, version);
    remarks(&planned, version, gone);
    let total = planned.total();
    let (Some(reason), true, true) = (&options.reason, options.apply, total.rows > 0) else {
        if total.rows > 0 {
            println!("\nnothing was changed; --apply --reason TEXT does it");
        }
        return Ok(());
    };

    // First who it is: no adjustment is there of which the record does not tell.
    let usd = |amounts: [NanoUsd; 2]| json!({"billed_usd": amounts[0].to_string(), "provider_cost_usd": amounts[1].to_string()});
    let words = json!({
        "reason": reason, "price_version": version, "rows": total.rows, "before": usd(total.before), "now": usd(total.after),
        "since": options.asked.since, "until": options.asked.until, "zone": options.asked.zone, "model": which.model,
        "route": which.route, "tenant": which.tenant, "only_unpriced": which.only_unpriced,
    });
    place.control()?.apply(&actor(), Change::Reprice(words), None).map_err(text)?;
    let run = Run { at_ns: SystemClock.now_ns(), reason, past_ns };
    let mut done = repricer();
    let applied = apply(store, first_ns, &run, &mut done);
    let total = done.report.total();
    println!("\n{} rows were adjusted", total.rows);
    applied.map_err(|error| format!("{error}; what was adjusted stays so, the rest waits for another run"))
}

/// Page by page. A gateway that writes to the same file gets its turn in between.
fn apply(store: &Database, first_ns: i64, run: &Run<'_>, repricer: &mut Repricer<'_>) -> Result<(), StoreError> {
    let mut adjuster = store.adjuster()?;
    let mut cursor = Some(Cursor::before(first_ns));
    while let Some(from) = cursor {
        let began = std::time::Instant::now();
        cursor = adjuster.page(&from, run, &mut |booked| repricer.judge(booked))?;
        if cursor.is_some() && matches!(store, Database::Sqlite(_)) {
            std::thread::sleep(began.elapsed());
        }
    }
    Ok(())
}

/// Requests whose hours are told of and whose rows are not kept any more.
fn gone(books: &dyn Books, which: &Which, first_ns: i64, past_ns: i64, report: &Report) -> Result<u64, StoreError> {
    if which.only_unpriced || books.kept_from()?.is_none() {
        return Ok(0);
    }
    let all = books.spend(&[By::Model, By::Route, By::Tenant], &[Period { name: String::new(), first_ns, past_ns }])?;
    let asked = all.iter().filter(|spend| which.is_of(&spend.by[0], &spend.by[1], &spend.by[2]));
    Ok(asked.map(|spend| spend.requests).sum::<u64>().saturating_sub(report.seen))
}

fn show(report: &Report, version: &str) {
    let total = report.total();
    println!("{} rows were looked at, {} cost something else by prices {version}", report.seen, total.rows);
    if total.rows == 0 {
        return;
    }
    println!(
        "\n{:28} {:16} {:>9} {:>18} {:>18} {:>19} {:>19}",
        "model", "price version", "rows", "billed USD", "now USD", "difference", "our cost difference"
    );
    let line = |model: &str, from: &str, sum: &Sum| {
        let [billed, cost] = [0, 1].map(|at| difference(sum.before[at], sum.after[at]));
        let (before, after) = (sum.before[0].to_string(), sum.after[0].to_string());
        println!("{model:28} {from:16} {:>9} {before:>18} {after:>18} {billed:>19} {cost:>19}", sum.rows);
    };
    for ((model, from), sum) in &report.changed {
        line(model, from, sum);
    }
    line("total", "", &total);
}

fn difference(before: NanoUsd, after: NanoUsd) -> String {
    match after.0.checked_sub(before.0) {
        Some(more) => format!("+{}", NanoUsd(more)),
        None => format!("-{}", NanoUsd(before.0 - after.0)),
    }
}

/// What stays as it is, and why.
fn remarks(report: &Report, version: &str, gone: u64) {
    for (model, rows) in &report.priceless {
        println!("{rows} rows of `{model}`, which has no price, stay as they are");
    }
    for (count, why) in [
        (
            report.same_version,
            format!("have prices {version} already and would cost something else: give a changed file a new version"),
        ),
        (report.of_device, "keep what they cost us: that is the time of a device, which rows do not hold".to_owned()),
        (gone, "are not kept any more, only what they sum up to; that stays".to_owned()),
    ] {
        if count > 0 {
            println!("{count} rows {why}");
        }
    }
}
