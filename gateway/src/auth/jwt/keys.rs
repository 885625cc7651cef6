//! Keys that tokens are signed with, and the algorithms that they are for. The arithmetic is ring's.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::Deserialize;

/// Keys in one set; an issuer has a handful.
const KEYS_MAX: usize = 64;
/// A shared secret is as strong as its hash (RFC 7518 3.2), or can be guessed from one token.
pub const SECRET_BYTES_MIN: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Hs256,
    Hs384,
    Hs512,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

impl Algorithm {
    pub const ALL: [Algorithm; 12] = [
        Algorithm::Hs256,
        Algorithm::Hs384,
        Algorithm::Hs512,
        Algorithm::Rs256,
        Algorithm::Rs384,
        Algorithm::Rs512,
        Algorithm::Ps256,
        Algorithm::Ps384,
        Algorithm::Ps512,
        Algorithm::Es256,
        Algorithm::Es384,
        Algorithm::EdDsa,
    ];

    /// As tokens write it, to the letter. `none` is none of them.
    pub fn parse(word: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|algorithm| algorithm.as_str() == word)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Hs256 => "HS256",
            Algorithm::Hs384 => "HS384",
            Algorithm::Hs512 => "HS512",
            Algorithm::Rs256 => "RS256",
            Algorithm::Rs384 => "RS384",
            Algorithm::Rs512 => "RS512",
            Algorithm::Ps256 => "PS256",
            Algorithm::Ps384 => "PS384",
            Algorithm::Ps512 => "PS512",
            Algorithm::Es256 => "ES256",
            Algorithm::Es384 => "ES384",
            Algorithm::EdDsa => "EdDSA",
        }
    }

    /// Whether both sides share one secret. Such a key is never published.
    pub fn is_shared(self) -> bool {
        matches!(self, Algorithm::Hs256 | Algorithm::Hs384 | Algorithm::Hs512)
    }
}

/// A key, with nothing of it shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Key {
    Secret(Vec<u8>),
    /// Modulus and exponent, big-endian, without leading zeros.
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// Points as `4 ‖ x ‖ y`.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Key {
    /// Whether this kind of key is what the algorithm works with: no token can have a public key taken for a secret.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        match self {
            Key::Secret(_) => algorithm.is_shared(),
            Key::Rsa { .. } => matches!(
                algorithm,
                Algorithm::Rs256
                    | Algorithm::Rs384
                    | Algorithm::Rs512
                    | Algorithm::Ps256
                    | Algorithm::Ps384
                    | Algorithm::Ps512
            ),
            Key::P256(_) => algorithm == Algorithm::Es256,
            Key::P384(_) => algorithm == Algorithm::Es384,
            Key::Ed25519(_) => algorithm == Algorithm::EdDsa,
        }
    }

    /// Whether this key has signed `message`.
    pub fn has_signed(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let checked = match self {
            Key::Secret(secret) => {
                let hash = match algorithm {
                    Algorithm::Hs256 => hmac::HMAC_SHA256,
                    Algorithm::Hs384 => hmac::HMAC_SHA384,
                    Algorithm::Hs512 => hmac::HMAC_SHA512,
                    _ => return false,
                };
                hmac::verify(&hmac::Key::new(hash, secret), message, signature)
            }
            Key::Rsa { n, e } => {
                let scheme = match algorithm {
                    Algorithm::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                    Algorithm::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
                    Algorithm::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
                    Algorithm::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
                    _ => return false,
                };
                RsaPublicKeyComponents { n, e }.verify(scheme, message, signature)
            }
            _ if !self.fits(algorithm) => return false,
            Key::P256(point) => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            Key::P384(point) => {
                UnparsedPublicKey::new(&signature::ECDSA_P384_SHA384_FIXED, point).verify(message, signature)
            }
            Key::Ed25519(point) => UnparsedPublicKey::new(&signature::ED25519, point).verify(message, signature),
        };
        checked.is_ok()
    }

    /// Reads a `PUBLIC KEY` in PEM: RSA from 2048 bits on, P-256, P-384 or Ed25519.
    ///
    /// # Errors
    /// What must be there instead.
    pub fn from_pem(text: &str) -> Result<Key, &'static str> {
        use rustls::pki_types::SubjectPublicKeyInfoDer;
        use rustls::pki_types::pem::PemObject;
        let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes())
            .map_err(|_| "must hold a public key in PEM, which begins with -----BEGIN PUBLIC KEY-----")?;
        from_spki(&der).ok_or("must hold an RSA key from 2048 bits on, or one of P-256, P-384 or Ed25519")
    }
}

const OID_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const OID_EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const OID_P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const OID_P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];
const OID_ED25519: &[u8] = &[0x2b, 0x65, 0x70];

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;

/// `SubjectPublicKeyInfo` (RFC 5280 4.1): which kind of key, and its bits.
fn from_spki(der: &[u8]) -> Option<Key> {
    let (info, _) = element(SEQUENCE, der)?;
    let (kind, rest) = element(SEQUENCE, info)?;
    let (bits, _) = element(BIT_STRING, rest)?;
    let (unused, bits) = bits.split_first()?;
    let (oid, parameters) = element(OID, kind)?;
    let key = match oid {
        OID_RSA => {
            let (numbers, _) = element(SEQUENCE, bits)?;
            let (n, rest) = element(INTEGER, numbers)?;
            let (e, _) = element(INTEGER, rest)?;
            rsa(n, e)?
        }
        OID_EC => match element(OID, parameters)?.0 {
            OID_P256 => Key::P256(point(bits, 65)?),
            OID_P384 => Key::P384(point(bits, 97)?),
            _ => return None,
        },
        OID_ED25519 => Key::Ed25519((bits.len() == 32).then(|| bits.to_vec())?),
        _ => return None,
    };
    (*unused == 0).then_some(key)
}

/// One DER element of this kind: what is in it, and what comes after it.
fn element(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        _ => return None,
    };
    (found == tag).then(|| rest.split_at_checked(length))?
}

fn point(bytes: &[u8], length: usize) -> Option<Vec<u8>> {
    (bytes.len() == length && bytes.first() == Some(&4)).then(|| bytes.to_vec())
}

fn rsa(n: &[u8], e: &[u8]) -> Option<Key> {
    let number = |bytes: &[u8]| bytes.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
    let (n, e) = (number(n), number(e));
    let bits = n.len() * 8 - n.first()?.leading_zeros() as usize;
    (2048..=8192).contains(&bits).then_some(Key::Rsa { n, e })
}

/// A key of a published set, with what it says of itself.
#[derive(Clone, Debug)]
pub struct Named {
    pub id: Option<String>,
    /// The one algorithm that it may be used with, if it says so.
    pub algorithm: Option<Algorithm>,
    pub key: Key,
}

/// The members of a JWK (RFC 7517) that we read.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// Reads a JWK set. Keys that are not for signatures, or of a kind that we do not know, are left out; a shared secret is
/// never published, so one that is there is nobody's.
///
/// # Errors
/// What is wrong with the set as a whole.
pub fn parse_set(json: &[u8]) -> Result<Vec<Named>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(json).map_err(|error| format!("it is no JWK set: {error}"))?;
    if set.keys.len() > KEYS_MAX {
        return Err(format!("it has {} keys, and may have {KEYS_MAX}", set.keys.len()));
    }
    let keys: Vec<Named> = set.keys.into_iter().filter_map(|jwk| named(serde_json::from_value(jwk).ok()?)).collect();
    if keys.is_empty() { Err("it has no key that tokens could be signed with".into()) } else { Ok(keys) }
}

fn named(jwk: Jwk) -> Option<Named> {
    if jwk.usage.is_some_and(|usage| usage != "sig") {
        return None;
    }
    let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_ref()?).ok();
    let on_curve = |length: usize| {
        let (x, y) = (bytes(&jwk.x)?, bytes(&jwk.y)?);
        point(&[&[4_u8][..], x.as_slice(), y.as_slice()].concat(), 1 + 2 * length).filter(|_| x.len() == length)
    };
    let key = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) => rsa(&bytes(&jwk.n)?, &bytes(&jwk.e)?)?,
        ("EC", Some("P-256")) => Key::P256(on_curve(32)?),
        ("EC", Some("P-384")) => Key::P384(on_curve(48)?),
        ("OKP", Some("Ed25519")) => Key::Ed25519(bytes(&jwk.x).filter(|x| x.len() == 32)?),
        _ => return None,
    };
    // One that is for something else is not for us.
    let algorithm = match &jwk.alg {
        Some(word) => Some(Algorithm::parse(word).filter(|algorithm| key.fits(*algorithm))?),
        None => None,
    };
    Some(Named { id: jwk.kid, algorithm, key })
}

/// What the cache knows a token by: all of it, so that two that differ anywhere share nothing.
pub fn fingerprint(token: &str) -> [u8; 32] {
    *blake3::hash(token.as_bytes()).as_bytes()
}
