//! `glassgate ledger`: is it whole, and all of it for other tools.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::{Outcome, Place, client, ledger, parquet, reprice, text, when};
use crate::accounting::ledger::disk::RealDisk;
use crate::accounting::ledger::store::{Books, Database};
use crate::accounting::ledger::verify::{Scrape, verify};
use crate::accounting::reprice::{Booked, STANDING_COLUMNS};
use crate::accounting::row::{COLUMNS, Cell};
use crate::data_dir::DataDir;

#[derive(Subcommand)]
pub enum LedgerCommand {
    /// Hold log, rows, hourly sums and metrics against each other; fails and says where they differ
    Verify {
        /// The last metrics of a gateway that has ended, as it told them at /metrics: the ledger must hold as much
        #[arg(long, value_name = "FILE")]
        metrics: Option<PathBuf>,
    },
    /// Write all rows to stdout, by when they began: as they were written, and what they count as by now (…_now)
    Export {
        #[arg(long, value_enum, default_value = "csv")]
        format: Format,
        #[command(flatten)]
        asked: when::Between,
    },
    /// Price rows again by today's prices, each as of when it began; shows what that changes, and changes it with --apply
    Reprice(reprice::Options),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// RFC 4180, with the columns' names
    Csv,
    /// One JSON object a line
    Ndjson,
    /// One Parquet file
    Parquet,
}

pub fn run(place: &Place, command: LedgerCommand) -> Outcome {
    let data_dir = place.data_dir()?;
    let store = place.store(&data_dir)?;
    match command {
        LedgerCommand::Verify { metrics } => verify_it(&data_dir, &store, metrics),
        LedgerCommand::Export { format, asked } => {
            let when::Times { since, until, .. } = asked.read(Timestamp::now())?;
            let first = since.map_or(i64::MIN, when::nanoseconds);
            let past = until.map_or(i64::MAX, when::nanoseconds);
            export(&store, format, first, past)
        }
        LedgerCommand::Reprice(options) => reprice::run(place, &store, &options),
    }
}

fn verify_it(data_dir: &DataDir, store: &Database, metrics: Option<PathBuf>) -> Outcome {
    // Before anything else is read: what they tell the ledger must hold by then.
    let told = match &metrics {
        Some(path) => Some(std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => client::get(data_dir, "/metrics").ok().and_then(|(_, body)| String::from_utf8(body).ok()),
    };
    let scrape = told.map(|text| Scrape::parse(&text)).transpose()?;
    // Says it in words where there is none.
    drop(ledger(store)?);
    let disk = RealDisk::new(data_dir.path().join("wal"));
    let legs = verify(&disk, || store.books(), scrape).map_err(text)?;
    for leg in &legs {
        println!("{}  {}: {}", if leg.is_whole() { "ok " } else { "BAD" }, leg.name, leg.told);
        leg.differences.iter().for_each(|difference| println!("       {difference}"));
    }
    if scrape.is_none() {
        println!("--   metrics: nobody to ask; give the last ones that the gateway told with --metrics FILE");
    }
    let bad = legs.iter().filter(|leg| !leg.is_whole()).count();
    if bad == 0 { Ok(()) } else { Err(format!("the ledger is not whole: {bad} of {} checks differ", legs.len())) }
}

fn export(store: &Database, format: Format, first_ns: i64, past_ns: i64) -> Outcome {
    let books = ledger(store)?;
    let span = (first_ns, past_ns);
    match format {
        Format::Csv => lines(&*books, span, Some(columns().map(|(name, _)| name).collect::<Vec<_>>().join(",")), csv),
        Format::Ndjson => lines(&*books, span, None, ndjson),
        Format::Parquet => file(&*books, span),
    }
}

fn lines(
    books: &dyn Books,
    (first_ns, past_ns): (i64, i64),
    head: Option<String>,
    line: fn(&Booked) -> String,
) -> Outcome {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut written = head.map_or(Ok(()), |head| writeln!(out, "{head}"));
    let rows = books.rows(first_ns, past_ns, &mut |row| {
        if written.is_ok() {
            written = writeln!(out, "{}", line(&row));
        }
        written.is_ok()
    });
    match written.and_then(|()| out.flush()) {
        // Whoever reads has enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(text).and(rows.map_err(text)),
    }
}

fn file(books: &dyn Books, (first_ns, past_ns): (i64, i64)) -> Outcome {
    let mut file = parquet::File::begin(std::io::stdout()).map_err(text)?;
    let mut written = Ok(());
    let rows = books.rows(first_ns, past_ns, &mut |row| {
        written = file.add(row);
        written.is_ok()
    });
    // What ends without its last bytes no reader takes for a whole file.
    rows.map_err(text)?;
    written.and_then(|()| file.end()).map_err(text)
}

fn csv(row: &Booked) -> String {
    row.cells().iter().map(|cell| quoted(&cell.to_string())).collect::<Vec<_>>().join(",")
}

fn ndjson(row: &Booked) -> String {
    let value = |cell: Cell<'_>| match cell {
        Cell::Text(text) => Value::from(text),
        Cell::Integer(number) => Value::from(number),
        Cell::Null => Value::Null,
    };
    let named = columns().map(|(name, _)| name.to_owned());
    Value::Object(named.zip(row.cells().into_iter().map(value)).collect::<Map<_, _>>()).to_string()
}

/// What is exported of a row: its columns, and what it counts as.
pub fn columns() -> impl Iterator<Item = (&'static str, &'static str)> {
    COLUMNS.into_iter().chain(STANDING_COLUMNS)
}

/// A field of a CSV file: in quotes where it has to be.
fn quoted(field: &str) -> String {
    if field.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_would_break_a_line_of_csv_is_quoted() {
        for (field, written) in
            [("plain", "plain"), ("a,b", "\"a,b\""), ("say \"x\"", "\"say \"\"x\"\"\""), ("a\nb", "\"a\nb\"")]
        {
            assert_eq!(quoted(field), written);
        }
    }
}
