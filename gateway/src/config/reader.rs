//! Reads TOML so that every problem is found in one pass: wrong types, values out of range, and keys that do not exist.
//!
//! A derived `deny_unknown_fields` stops at the first error and knows no lines. Here a `Section` is asked for the keys it
//! may have; what is left over at the end is unknown, and the asked-for names are what "did you mean" chooses from.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problems, did_you_mean};
use super::secret::Secret;

/// Nothing here waits longer; more would overflow clocks.
const DURATION_MIN: Duration = Duration::from_millis(1);
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// One file's text, and where its problems go.
pub struct Source<'t> {
    path: PathBuf,
    text: &'t str,
    problems: RefCell<Problems>,
    /// Every key path that was ever asked for, with names that the user chooses written `*`.
    asked: RefCell<BTreeSet<String>>,
}

impl<'t> Source<'t> {
    pub fn new(path: &Path, text: &'t str) -> Self {
        Source { path: path.to_owned(), text, problems: RefCell::default(), asked: RefCell::default() }
    }

    /// Parses the text; syntax errors become problems, and what could be parsed is still read.
    pub fn parse(&self) -> Spanned<DeTable<'t>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            self.problem(at, format!("not valid TOML: {}", error.message()));
        }
        table
    }

    pub fn root<'s>(&'s self, table: &'s Spanned<DeTable<'t>>) -> Section<'s, 't> {
        Section {
            source: self,
            table: table.get_ref(),
            at: 0,
            path: String::new(),
            generic: String::new(),
            known: RefCell::default(),
        }
    }

    pub fn problem(&self, at: usize, what: impl Into<String>) {
        let line = self.text.get(..at).map_or(1, |before| before.matches('\n').count() + 1);
        self.problems.borrow_mut().add(&self.path, line, what);
    }

    pub fn into_parts(self) -> (Problems, BTreeSet<String>) {
        (self.problems.into_inner(), self.asked.into_inner())
    }
}

/// A table that is being read.
pub struct Section<'s, 't> {
    source: &'s Source<'t>,
    table: &'s DeTable<'t>,
    at: usize,
    path: String,
    generic: String,
    known: RefCell<Vec<String>>,
}

/// A value and where it stands, for problems that only show later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At<T> {
    pub value: T,
    pub at: usize,
}

impl<'s, 't> Section<'s, 't> {
    fn get(&self, key: &str) -> Option<&'s Spanned<DeValue<'t>>> {
        if !self.known.borrow().iter().any(|known| known == key) {
            self.known.borrow_mut().push(key.to_owned());
            self.source.asked.borrow_mut().insert(join(&self.generic, key));
        }
        self.table.get(key)
    }

    pub fn problem(&self, what: impl Into<String>) {
        self.source.problem(self.at, what);
    }

    /// Whether a key is there, whatever it says.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    pub fn problem_at(&self, at: usize, what: impl Into<String>) {
        self.source.problem(at, what);
    }

    pub fn name(&self) -> &str {
        &self.path
    }

    fn wrong(&self, key: &str, value: &Spanned<DeValue<'_>>, expected: impl Display) {
        self.source.problem(
            value.span().start,
            format!("`{}` must be {expected}, not {}", join(&self.path, key), an(value.get_ref().type_str())),
        );
    }

    pub fn string(&self, key: &str) -> Option<At<String>> {
        let value = self.get(key)?;
        match value.get_ref().as_str() {
            Some(text) => Some(At { value: text.to_owned(), at: value.span().start }),
            None => {
                self.wrong(key, value, "a string");
                None
            }
        }
    }

    /// One of a closed set of words.
    pub fn word(&self, key: &str, words: &[&'static str]) -> Option<&'static str> {
        let found = self.string(key)?;
        let word = words.iter().find(|word| **word == found.value).copied();
        if word.is_none() {
            let known = words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ");
            self.source.problem(
                found.at,
                format!(
                    "`{}` must be {known}, not \"{}\"{}",
                    join(&self.path, key),
                    found.value,
                    did_you_mean(&found.value, words.iter().copied())
                ),
            );
        }
        word
    }

    pub fn strings(&self, key: &str) -> Option<Vec<At<String>>> {
        let value = self.get(key)?;
        let texts = value.get_ref().as_array().and_then(|items| {
            items
                .iter()
                .map(|item| item.get_ref().as_str().map(|text| At { value: text.to_owned(), at: item.span().start }))
                .collect()
        });
        if texts.is_none() {
            self.wrong(key, value, "a list of strings");
        }
        texts
    }

    pub fn boolean(&self, key: &str) -> Option<bool> {
        let value = self.get(key)?;
        if value.get_ref().as_bool().is_none() {
            self.wrong(key, value, "true or false");
        }
        value.get_ref().as_bool()
    }

    pub fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let value = self.get(key)?;
        let number = integer(value.get_ref()).filter(|number| range.contains(number));
        if number.is_none() {
            self.source.problem(
                value.span().start,
                format!("`{}` must be a whole number from {} to {}", join(&self.path, key), range.start(), range.end()),
            );
        }
        number
    }

    /// A number of any kind, as a float.
    pub fn number(&self, key: &str) -> Option<At<f64>> {
        let value = self.get(key)?;
        let number = match value.get_ref() {
            DeValue::Float(float) => float.as_str().replace('_', "").parse().ok(),
            // Negative ones too: whether they can be meant is for the caller to say.
            DeValue::Integer(number) => {
                i64::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok().map(|number| number as f64)
            }
            _ => None,
        };
        if number.is_none() {
            self.wrong(key, value, "a number");
        }
        number.map(|number| At { value: number, at: value.span().start })
    }

    /// A span of time such as "250ms", "5s", "10m" or "1h".
    pub fn duration(&self, key: &str) -> Option<Duration> {
        self.duration_from(DURATION_MIN, "1ms", key)
    }

    /// As `duration`, and "0s" is one too.
    pub fn duration_or_none(&self, key: &str) -> Option<Duration> {
        self.duration_from(Duration::ZERO, "0s", key)
    }

    fn duration_from(&self, min: Duration, shown: &str, key: &str) -> Option<Duration> {
        let text = self.string(key)?;
        let duration = parse_duration(&text.value).filter(|duration| (min..=DURATION_MAX).contains(duration));
        if duration.is_none() {
            self.source.problem(
                text.at,
                format!(
                    "`{}` must be a time such as \"250ms\", \"5s\" or \"10m\", from \"{shown}\" to \"24h\", not \"{}\"",
                    join(&self.path, key),
                    text.value
                ),
            );
        }
        duration
    }

    /// A size such as "64KiB" or "4MiB", at least `min` bytes.
    pub fn bytes(&self, key: &str, min: u64) -> Option<u64> {
        let text = self.string(key)?;
        let size = parse_bytes(&text.value).filter(|size| *size >= min);
        if size.is_none() {
            self.source.problem(
                text.at,
                format!(
                    "`{}` must be a size such as \"64KiB\" or \"4MiB\", at least {min} bytes, not \"{}\"",
                    join(&self.path, key),
                    text.value
                ),
            );
        }
        size
    }

    /// A table of its own; absent reads as empty.
    pub fn section(&self, key: &str) -> Option<Section<'s, 't>> {
        let value = self.get(key)?;
        self.as_section(key, &join(&self.generic, key), value)
    }

    /// The tables below `key`, whose names the user chose, in the order of the file.
    pub fn sections(&self, key: &str) -> Vec<(At<String>, Section<'s, 't>)> {
        let Some(section) = self.section(key) else { return Vec::new() };
        let generic = format!("{}.*", join(&self.generic, key));
        section
            .table
            .iter()
            .filter_map(|(name, value)| {
                let section = section.as_section(name.get_ref(), &generic, value)?;
                Some((At { value: name.get_ref().to_string(), at: name.span().start }, section))
            })
            .collect()
    }

    /// A list of tables (`[[key]]`).
    pub fn list(&self, key: &str) -> Vec<Section<'s, 't>> {
        let Some(value) = self.get(key) else { return Vec::new() };
        match value.get_ref().as_array() {
            Some(items) => {
                items.iter().filter_map(|item| self.as_section(key, &join(&self.generic, key), item)).collect()
            }
            None => {
                self.wrong(key, value, format_args!("a list of tables (`[[{}]]`)", join(&self.path, key)));
                Vec::new()
            }
        }
    }

    /// Names that the user chose with a whole number each, in the order of the file.
    pub fn weights(&self, key: &str) -> Option<Vec<(At<String>, u32)>> {
        let value = self.get(key)?;
        let Some(table) = value.get_ref().as_table() else {
            self.wrong(key, value, "a table such as { glimmer-1 = 90, glimmer-2 = 10 }");
            return None;
        };
        let mut weights = Vec::new();
        for (name, weight) in table {
            match integer(weight.get_ref())
                .and_then(|weight| u32::try_from(weight).ok())
                .filter(|weight| *weight <= 1_000_000)
            {
                Some(number) => weights.push((At { value: name.get_ref().to_string(), at: name.span().start }, number)),
                None => self.source.problem(
                    weight.span().start,
                    format!(
                        "the weight of `{}` in `{}` must be a whole number from 0 to 1000000",
                        name.get_ref(),
                        join(&self.path, key)
                    ),
                ),
            }
        }
        Some(weights)
    }

    /// Names that the user chose with a text each, in the order of the file.
    pub fn texts(&self, key: &str) -> Option<Vec<(At<String>, At<String>)>> {
        let value = self.get(key)?;
        let Some(table) = value.get_ref().as_table() else {
            self.wrong(key, value, "a table of strings");
            return None;
        };
        let mut texts = Vec::new();
        for (name, text) in table {
            match text.get_ref().as_str() {
                Some(found) => texts.push((
                    At { value: name.get_ref().to_string(), at: name.span().start },
                    At { value: found.to_owned(), at: text.span().start },
                )),
                None => self.wrong(&join(key, name.get_ref()), text, "a string"),
            }
        }
        Some(texts)
    }

    /// A text as it is, or what the environment holds if it is `env:NAME`.
    pub fn resolve(&self, text: &At<String>) -> Option<Secret> {
        let Some(name) = text.value.strip_prefix("env:") else { return Some(Secret::new(&text.value)) };
        let found = std::env::var(name).ok().filter(|value| !value.is_empty());
        if found.is_none() {
            self.source.problem(text.at, format!("the environment variable `{name}` is not set"));
        }
        found.map(Secret::new)
    }

    fn as_section(&self, key: &str, generic: &str, value: &'s Spanned<DeValue<'t>>) -> Option<Section<'s, 't>> {
        match value.get_ref().as_table() {
            Some(table) => Some(Section {
                source: self.source,
                table,
                at: value.span().start,
                path: join(&self.path, key),
                generic: generic.to_owned(),
                known: RefCell::default(),
            }),
            None => {
                self.wrong(key, value, "a table");
                None
            }
        }
    }

    /// Ends the reading: what nobody asked for is unknown.
    pub fn finish(self) {
        let known = self.known.borrow();
        for (key, _) in self.table {
            if !known.iter().any(|name| name == key.get_ref()) {
                let hint = did_you_mean(key.get_ref(), known.iter().map(String::as_str));
                self.source
                    .problem(key.span().start, format!("unknown key `{}`{hint}", join(&self.path, key.get_ref())));
            }
        }
    }
}

fn integer(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(&integer.as_str().replace('_', ""), integer.radix()).ok()
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn an(kind: &str) -> String {
    match kind.starts_with(['a', 'e', 'i', 'o', 'u']) {
        true => format!("an {kind}"),
        false => format!("a {kind}"),
    }
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..digits].parse().ok()?, text[digits..].trim_start()))
}

fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text.trim())?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text.trim())?;
    let factor = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str, read: impl FnOnce(&Section<'_, '_>)) -> String {
        let source = Source::new(Path::new("f.toml"), text);
        let table = source.parse();
        let root = source.root(&table);
        read(&root);
        root.finish();
        source.into_parts().0.to_string()
    }

    #[test]
    fn every_problem_is_reported_at_once_with_its_line() {
        let text = "port = \"x\"\nwait = 5\nspeling = 1\nsize = \"4MB\"\n";
        let found = problems(text, |root| {
            root.integer("port", 1..=9);
            root.duration("wait");
            root.integer("spelling", 1..=9);
            root.bytes("size", 1);
        });
        assert_eq!(
            found,
            "f.toml:1: `port` must be a whole number from 1 to 9\n\
             f.toml:2: `wait` must be a string, not an integer\n\
             f.toml:4: `size` must be a size such as \"64KiB\" or \"4MiB\", at least 1 bytes, not \"4MB\"\n\
             f.toml:3: unknown key `speling`. Did you mean `spelling`?"
        );
    }

    #[test]
    fn broken_toml_is_reported_and_the_rest_is_still_read() {
        let found = problems("a = [1\nb = 2\n", |root| {
            root.integer("b", 1..=1);
        });
        assert!(found.contains("not valid TOML"), "{found}");
    }

    #[test]
    fn times_and_sizes_have_units() {
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("10m"), Some(Duration::from_secs(600)));
        assert_eq!(parse_duration("10"), None);
        assert_eq!(parse_duration("-1s"), None);
        assert_eq!(parse_bytes("4MiB"), Some(4 << 20));
        assert_eq!(parse_bytes("99999999999GiB"), None);
    }
}
