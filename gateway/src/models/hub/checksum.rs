//! What the hub says a file's bytes are.

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// A file's identity on the hub, in hex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// Of the bytes: large files.
    Sha256(String),
    /// Of git's blob, `blob <length>\0` and the bytes: small files.
    GitBlob(String),
}

impl Checksum {
    /// As an entity tag gives it: 64 hex digits are one kind, 40 the other.
    pub fn from_etag(etag: &str) -> Option<Checksum> {
        let hex = etag.trim_start_matches("W/").trim_matches('"');
        let is_hex = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        match hex.len() {
            64 if is_hex => Some(Checksum::Sha256(hex.to_ascii_lowercase())),
            40 if is_hex => Some(Checksum::GitBlob(hex.to_ascii_lowercase())),
            _ => None,
        }
    }

    /// A running sum over a file of `len` bytes.
    pub fn start(&self, len: u64) -> Context {
        match self {
            Checksum::Sha256(_) => Context::new(&SHA256),
            Checksum::GitBlob(_) => {
                let mut sum = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                sum.update(format!("blob {len}\0").as_bytes());
                sum
            }
        }
    }

    pub fn is(&self, sum: Context) -> bool {
        let hex: String = sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Checksum::Sha256(expected) | Checksum::GitBlob(expected) => *expected == hex,
        }
    }
}
