//! `glassgate audit`: who changed what.

use clap::Subcommand;
use serde_json::Value;

use super::{Outcome, Place, text};
use crate::admin::entry;
use crate::auth::store::{Entry, Head, KeyStore, Verifier};
use crate::control::export::hex;

/// Entries that are read at once.
const PAGE: u32 = 1_000;

#[derive(Subcommand)]
pub enum AuditCommand {
    /// List changes, oldest first
    List {
        /// Only those after this one
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        after: i64,
        /// Print a JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Check that every entry is there as it was written; prints the last one's seal, which shows later that none was cut off
    Verify {
        /// A seal that was printed before, as NUMBER:SEAL
        #[arg(long, value_name = "SEAL")]
        expect: Option<String>,
    },
}

pub fn run(place: &Place, command: AuditCommand) -> Outcome {
    let control = place.control()?;
    let store = control.store().map_err(text)?;
    match command {
        AuditCommand::List { after, json } => each(&store, after, |found| match json {
            true => println!("{}", entry(found)),
            false => println!("{}", line(found)),
        }),
        AuditCommand::Verify { expect } => {
            let key = control.chain_key(&store).map_err(text)?;
            let mut verifier = Verifier::new(&key);
            let (mut count, mut expected) = (0u64, expect.is_none());
            each(&store, 0, |entry| {
                count += 1;
                expected |= expect.as_deref() == Some(&seal(&Head { n: entry.n, hash: entry.hash }));
                verifier.read(entry);
            })?;
            let head = store.head().map_err(text)?;
            let mut broken: Vec<String> = verifier.end(head).iter().map(ToString::to_string).collect();
            broken.extend((!expected).then(|| format!("no entry has the seal {}", expect.unwrap_or_default())));
            if !broken.is_empty() {
                return Err(format!("the record of changes was tampered with:\n{}", broken.join("\n")));
            }
            println!(
                "{count} entries, all as they were written; the last is {}",
                head.map_or_else(String::new, |head| seal(&head))
            );
            Ok(())
        }
    }
}

fn seal(head: &Head) -> String {
    format!("{}:{}", head.n, &hex(&head.hash)[..32])
}

fn each(store: &KeyStore, mut after: i64, mut what: impl FnMut(&Entry)) -> Outcome {
    loop {
        let entries = store.audit(after, PAGE).map_err(text)?;
        let Some(last) = entries.last() else { return Ok(()) };
        after = last.n;
        entries.iter().for_each(&mut what);
    }
}

fn line(found: &Entry) -> String {
    let told = entry(found);
    let mut change = told["change"].clone();
    let subject = ["key", "tenant", "rule"].iter().find_map(|what| Some(format!("{what} {}", change[*what].as_str()?)));
    let name = change["change"].as_str().unwrap_or("?").to_owned();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let after = change["after"].take();
    let after = if after.is_null() { String::new() } else { after.to_string() };
    format!(
        "{:>6}  {}  {:28} {name:15} {}  {after}",
        found.n,
        word(&told["at"]),
        found.actor,
        subject.unwrap_or_default()
    )
}
