//! API keys: `gg-<public id>-<secret>`. The id finds the row, the secret proves it; only a keyed hash is stored.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// 12 characters of base 36: enough to be unique, short enough to talk about.
const ID_CHARS: usize = 12;
/// 40 characters of base 36 hold 206 bits.
const SECRET_CHARS: usize = 40;
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// A key as presented or just made. Prints without its secret.
pub struct ApiKey<'a> {
    id: &'a str,
    token: &'a str,
}

impl std::fmt::Debug for ApiKey<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gg-{}-***", self.id)
    }
}

impl<'a> ApiKey<'a> {
    /// `None` unless the text has exactly the form of a key.
    pub fn parse(token: &'a str) -> Option<Self> {
        let rest = token.strip_prefix("gg-")?;
        let (id, secret) = rest.split_once('-')?;
        let is_word = |text: &str, length| text.len() == length && text.bytes().all(|byte| ALPHABET.contains(&byte));
        (is_word(id, ID_CHARS) && is_word(secret, SECRET_CHARS)).then_some(ApiKey { id, token })
    }

    pub fn id(&self) -> &str {
        self.id
    }

    /// What is stored instead of the key. Whoever compares it does so in constant time.
    pub fn hash(&self, pepper: &Pepper) -> [u8; 32] {
        *blake3::keyed_hash(&pepper.0, self.token.as_bytes()).as_bytes()
    }
}

/// A new key's text.
///
/// # Errors
/// When the operating system has no randomness to give.
pub fn generate() -> Result<String, getrandom::Error> {
    Ok(format!("gg-{}-{}", word(ID_CHARS)?, word(SECRET_CHARS)?))
}

/// A new secret for the key with this id.
///
/// # Errors
/// When the operating system has no randomness to give.
pub fn renew(id: &str) -> Result<String, getrandom::Error> {
    Ok(format!("gg-{id}-{}", word(SECRET_CHARS)?))
}

fn word(length: usize) -> Result<String, getrandom::Error> {
    let mut word = String::with_capacity(length);
    while word.len() < length {
        let mut bytes = [0; 64];
        getrandom::fill(&mut bytes)?;
        // 252 is the largest multiple of 36 in a byte: taking more would favour the first letters.
        let chars = bytes.iter().filter(|byte| **byte < 252);
        word.extend(chars.take(length - word.len()).map(|byte| char::from(ALPHABET[usize::from(byte % 36)])));
    }
    Ok(word)
}

/// The key of the keyed hash: without it, the store's hashes say nothing, not even to a dictionary.
#[derive(Clone, PartialEq, Eq)]
pub struct Pepper([u8; 32]);

impl std::fmt::Debug for Pepper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Pepper {
    /// `None` unless the text has 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Pepper> {
        blake3::Hash::from_hex(text).ok().map(|bytes| Pepper(bytes.into()))
    }

    /// Reads the pepper beside the store, or makes it (0600) the first time. Two processes that make it at once agree.
    ///
    /// # Errors
    /// When the file cannot be read or written, or has been cut.
    pub fn load(path: &Path) -> std::io::Result<Pepper> {
        if !path.exists() {
            let mut bytes = [0; 32];
            getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
            let new = path.with_extension(format!("new-{}", std::process::id()));
            let mut file =
                std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            // A link appears whole or not at all, and never replaces the file that another process was quicker to make.
            let linked = std::fs::hard_link(&new, path);
            std::fs::remove_file(&new)?;
            match linked {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        std::fs::read(path)?.try_into().map(Pepper).map_err(|_| {
            std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                "the file must hold exactly 32 bytes; without the original, no key can be checked",
            )
        })
    }

    /// Tells two peppers apart and says nothing about either.
    pub fn mark(&self) -> String {
        blake3::Hash::from_bytes(self.derive("glassgate 2026-11 pepper mark")).to_hex()[..16].to_owned()
    }

    /// A key for something else; it says nothing about the pepper.
    pub fn derive(&self, purpose: &str) -> [u8; 32] {
        blake3::derive_key(purpose, &self.0)
    }

    #[cfg(test)]
    pub fn for_tests() -> Pepper {
        Pepper([7; 32])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_made_key_parses_and_proves_itself_and_no_other_does() {
        let pepper = Pepper::for_tests();
        let (mine, other) = (generate().unwrap(), generate().unwrap());
        let mine = ApiKey::parse(&mine).unwrap();
        let stored = mine.hash(&pepper);
        assert_eq!(mine.hash(&pepper), stored);
        assert_ne!(ApiKey::parse(&other).unwrap().hash(&pepper), stored);
        assert!(!format!("{mine:?}").contains(&mine.token[16..]));
    }

    #[test]
    fn a_secret_of_one_key_with_the_id_of_another_is_refused() {
        let pepper = Pepper::for_tests();
        let (a, b) = (generate().unwrap(), generate().unwrap());
        let stored = ApiKey::parse(&a).unwrap().hash(&pepper);
        let mixed = format!("{}{}", &a[..16], &b[16..]);
        assert_ne!(ApiKey::parse(&mixed).unwrap().hash(&pepper), stored);
    }

    proptest! {
        #[test]
        fn anything_that_is_not_a_key_is_refused_without_panic(text in ".{0,80}") {
            prop_assume!(!text.starts_with("gg-"));
            prop_assert!(ApiKey::parse(&text).is_none());
        }
    }
}
