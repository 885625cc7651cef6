//! `storage.database` of `gateway.toml`: where the ledger's rows and the key store are kept, if not in the data folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::folder_of;
use super::reader::{Section, Source};
use crate::auth::api_key::Pepper;
use crate::database::postgres::Target;

/// `read` reads a file that is then watched.
pub(super) fn database(
    storage: &Section<'_, '_>,
    folder: &Path,
    mut read: impl FnMut(PathBuf) -> String,
) -> Option<Arc<Target>> {
    let (named, ca) = (storage.string("database"), storage.string("database_ca"));
    let Some(named) = named else {
        if let Some(ca) = ca {
            storage.problem_at(
                ca.at,
                "`storage.database_ca` says who signs the certificate of `storage.database`, and there is none",
            );
        }
        return None;
    };
    let url = storage.resolve(&named)?;
    let ca = ca.map(|ca| read(folder.join(ca.value)));
    match Target::parse(url.expose(), ca.as_deref()) {
        Ok(target) if target.has_password() && !named.value.starts_with("env:") => {
            let what = "`storage.database` holds a password, and files are shown and shared; write \"env:DATABASE_URL\" and set that";
            storage.problem_at(named.at, what);
            None
        }
        Ok(target) => Some(Arc::new(target)),
        Err(why) => {
            storage.problem_at(named.at, format!("`storage.database`: {why}"));
            None
        }
    }
}

/// Months that rows may be kept; limits of a month ask for that month's.
const MONTHS: std::ops::RangeInclusive<u32> = 2..=1_200;

/// A number of months, such as "13 months".
pub(super) fn months(section: &Section<'_, '_>, key: &str) -> Option<u32> {
    let text = section.string(key)?;
    let months = text.value.strip_suffix(" months").and_then(|number| number.parse().ok());
    let months = months.filter(|months| MONTHS.contains(months));
    if months.is_none() {
        let (name, least, most) = (section.name(), MONTHS.start(), MONTHS.end());
        let what =
            format!("`{name}.{key}` must be from \"{least} months\" to \"{most} months\", such as \"13 months\"");
        section.problem_at(text.at, what);
    }
    months
}

/// What a file says of it, whatever else is in that and in its siblings: commands that only read the ledger need no more.
///
/// # Errors
/// What is wrong with it.
pub fn database_of(path: &Path) -> Result<Option<Arc<Target>>, String> {
    partly(path, |root, read| database(&root.section("storage")?, folder_of(path), read))
}

/// Likewise of the pepper.
///
/// # Errors
/// What is wrong with it.
pub fn pepper_of(path: &Path) -> Result<Option<Pepper>, String> {
    partly(path, |root, _| super::auth::pepper(&root.section("auth")?))
}

/// Reads what `what` asks for.
fn partly<T>(
    path: &Path,
    what: impl FnOnce(&Section<'_, '_>, &mut dyn FnMut(PathBuf) -> String) -> Option<T>,
) -> Result<Option<T>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let source = Source::new(path, &text);
    let table = source.parse();
    let mut unreadable = None;
    let mut read = |file: PathBuf| {
        std::fs::read_to_string(&file).unwrap_or_else(|error| {
            unreadable = Some(format!("{}: {error}", file.display()));
            String::new()
        })
    };
    let found = what(&source.root(&table), &mut read);
    let (problems, _) = source.into_parts();
    match unreadable {
        Some(why) => Err(why),
        None if problems.0.is_empty() => Ok(found),
        None => Err(format!("the configuration cannot be used:\n{problems}")),
    }
}
