//! `hf://org/name@revision` for a folder, `hf://org/name@revision/file.gguf` for one file of it.

use std::fmt;

/// A model on the hub. Its parts are safe to put into URLs and file names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `org/name`.
    pub repository: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// The one `.gguf` file that is wanted, instead of the folder.
    pub file: Option<String>,
}

pub const SCHEME: &str = "hf://";
const REVISION: &str = "main";

impl Reference {
    /// # Errors
    /// In words for who wrote it.
    pub fn parse(text: &str) -> Result<Reference, String> {
        let wrong = || {
            format!(
                "\"{text}\" is no model on the hub: write hf://org/name@revision, or hf://org/name@revision/file.gguf"
            )
        };
        let rest = text.strip_prefix(SCHEME).ok_or_else(wrong)?;
        let mut parts = rest.splitn(3, '/');
        let (org, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let file = parts.next().map(str::to_owned);
        let (name, revision) = name.split_once('@').unwrap_or((name, REVISION));
        let fine = [org, name, revision].into_iter().all(is_name)
            && file.as_ref().is_none_or(|file| is_name(file) && file.ends_with(".gguf"));
        if !fine {
            return Err(wrong());
        }
        Ok(Reference { repository: format!("{org}/{name}"), revision: revision.to_owned(), file })
    }

    /// Whether the revision can never mean anything else.
    pub fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// One component of a path, and nothing that a URL would read otherwise.
pub(super) fn is_name(text: &str) -> bool {
    (1..=200).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}@{}", self.repository, self.revision)?;
        self.file.as_ref().map_or(Ok(()), |file| write!(f, "/{file}"))
    }
}

#[cfg(test)]
mod tests {
    use super::Reference;

    #[test]
    fn references_read_as_they_are_written() {
        for text in [
            "hf://a/b@main",
            "hf://Org-1/name.v2@refs",
            "hf://a/b@0123456789abcdef0123456789abcdef01234567/x-Q4_K.gguf",
        ] {
            assert_eq!(Reference::parse(text).map(|reference| reference.to_string()).as_deref(), Ok(text));
        }
        assert_eq!(Reference::parse("hf://a/b").map(|reference| reference.revision).as_deref(), Ok("main"));
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        for text in [
            "a/b",
            "hf://",
            "hf://a",
            "hf://a/",
            "hf:///b",
            "hf://a/b@",
            "hf://../b",
            "hf://a/..@main",
            "hf://a/b@../c",
            "hf://a/b@main/x.bin",
            "hf://a/b@main/../x.gguf",
            "hf://a/b@main/d/x.gguf",
            "hf://a/b?x@main",
            "hf://a b/c",
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }
}
