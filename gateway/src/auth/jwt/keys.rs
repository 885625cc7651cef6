//! Keys that tokens are signed with, and the algorithms that they are for. Their formats are jsonwebtoken's.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
pub use jsonwebtoken::Algorithm;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{AlgorithmFamily, DecodingKey, DecodingKeyKind};
use serde::Deserialize;
use simple_asn1::ASN1Block;

/// Keys in one set; an issuer has a handful.
const KEYS_MAX: usize = 64;
/// A shared secret is as strong as its hash (RFC 7518 3.2), or can be guessed from one token.
pub const SECRET_BYTES_MIN: usize = 32;
/// What ring takes: less can be factored, more costs whoever asks us to verify nothing, and us much.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Points as `4 ‖ x ‖ y`.
const P256_BYTES: usize = 65;
const P384_BYTES: usize = 97;
const ED25519_BYTES: usize = 32;

/// All that tokens can be signed with. `none` is none of them.
pub fn algorithms() -> impl Iterator<Item = Algorithm> {
    use AlgorithmFamily::{Ec, Ed, Hmac, Rsa};
    [Hmac, Rsa, Ec, Ed].into_iter().flat_map(|family| family.algorithms().to_vec())
}

/// Whether both sides share one secret. Such a key is never published.
pub fn is_shared(algorithm: Algorithm) -> bool {
    algorithm.family() == AlgorithmFamily::Hmac
}

/// A key that is strong enough, with nothing of it shown.
#[derive(Clone)]
pub struct Key(pub(super) DecodingKey);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        use DecodingKeyKind::{RsaModulusExponent, SecretOrDer};
        self.0.family() == other.0.family()
            && match (self.0.kind(), other.0.kind()) {
                (SecretOrDer(one), SecretOrDer(other)) => one == other,
                (RsaModulusExponent { n, e }, RsaModulusExponent { n: other_n, e: other_e }) => {
                    (n, e) == (other_n, other_e)
                }
                _ => false,
            }
    }
}

impl Eq for Key {}

impl Key {
    pub fn secret(secret: &[u8]) -> Key {
        Key(DecodingKey::from_secret(secret))
    }

    /// Modulus and exponent, big-endian. `None` if it is too weak, or too large.
    pub fn rsa(n: &[u8], e: &[u8]) -> Option<Key> {
        let number = |bytes: &[u8]| bytes.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
        let (n, e) = (number(n), number(e));
        let bits = n.len() * 8 - n.first()?.leading_zeros() as usize;
        RSA_BITS.contains(&bits).then(|| Key(DecodingKey::from_rsa_raw_components(&n, &e)))
    }

    /// A point of P-256 or P-384.
    pub fn ec(point: &[u8]) -> Option<Key> {
        let is_point = matches!(point.len(), P256_BYTES | P384_BYTES) && point.first() == Some(&4);
        is_point.then(|| Key(DecodingKey::from_ec_der(point)))
    }

    pub fn ed25519(point: &[u8]) -> Option<Key> {
        (point.len() == ED25519_BYTES).then(|| Key(DecodingKey::from_ed_der(point)))
    }

    /// Reads a public key in PEM.
    ///
    /// # Errors
    /// What must be there instead.
    pub fn from_pem(text: &str) -> Result<Key, &'static str> {
        let pem = text.as_bytes();
        let rsa = || from_rsa_der(DecodingKey::from_rsa_pem(pem).ok()?.try_get_as_bytes().ok()?);
        let ec = || Key::ec(DecodingKey::from_ec_pem(pem).ok()?.try_get_as_bytes().ok()?);
        let ed = || Key::ed25519(DecodingKey::from_ed_pem(pem).ok()?.try_get_as_bytes().ok()?);
        rsa().or_else(ec).or_else(ed).ok_or(
            "must hold a public key in PEM, which begins with -----BEGIN PUBLIC KEY-----: RSA from 2048 bits on, P-256, P-384 or Ed25519",
        )
    }

    fn from_jwk(jwk: &Jwk) -> Option<Key> {
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).ok();
        let key = match &jwk.algorithm {
            AlgorithmParameters::RSA(key) => Key::rsa(&bytes(&key.n)?, &bytes(&key.e)?)?,
            AlgorithmParameters::EllipticCurve(key) => {
                let (x, y) = (bytes(&key.x)?, bytes(&key.y)?);
                let point = [&[4_u8][..], &x, &y].concat();
                let on_curve = match key.curve {
                    EllipticCurve::P256 => P256_BYTES,
                    EllipticCurve::P384 => P384_BYTES,
                    _ => return None,
                };
                Key::ec(&point).filter(|_| x.len() == y.len() && point.len() == on_curve)?
            }
            AlgorithmParameters::OctetKeyPair(key) => {
                Key::ed25519(&bytes(&key.x)?).filter(|_| key.curve == EllipticCurve::Ed25519)?
            }
            // A published secret among them: everybody has read it, so it is nobody's.
            _ => return None,
        };
        Some(key)
    }

    /// Whether this kind of key is what the algorithm works with: no token can have a public key taken for a secret.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        let is_as_long = |length| self.0.try_get_as_bytes().is_ok_and(|point| point.len() == length);
        self.0.family() == algorithm.family()
            && match algorithm {
                Algorithm::ES256 => is_as_long(P256_BYTES),
                Algorithm::ES384 => is_as_long(P384_BYTES),
                _ => true,
            }
    }
}

/// `RSAPublicKey` (RFC 8017 A.1.1): two numbers and nothing else.
fn from_rsa_der(der: &[u8]) -> Option<Key> {
    let blocks = simple_asn1::from_der(der).ok()?;
    let [ASN1Block::Sequence(_, numbers)] = blocks.as_slice() else { return None };
    let [ASN1Block::Integer(_, n), ASN1Block::Integer(_, e)] = numbers.as_slice() else { return None };
    Key::rsa(&n.to_signed_bytes_be(), &e.to_signed_bytes_be())
}

/// A key of a published set, with what it says of itself.
#[derive(Clone, Debug)]
pub struct Named {
    pub id: Option<String>,
    /// The one algorithm that it may be used with, if it says so.
    pub algorithm: Option<Algorithm>,
    pub key: Key,
}

/// Reads a JWK set (RFC 7517). Keys that are not for signatures, or of a kind that we do not know, are left out.
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
    let is_to_verify = |operations: &Vec<KeyOperations>| operations.contains(&KeyOperations::Verify);
    let is_for_signatures = jwk.common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature)
        && jwk.common.key_operations.as_ref().is_none_or(is_to_verify);
    let key = Key::from_jwk(&jwk).filter(|_| is_for_signatures)?;
    // One that is for something else is not for us.
    let algorithm = match jwk.common.key_algorithm {
        Some(named) => Some(Algorithm::try_from(named).ok().filter(|algorithm| key.fits(*algorithm))?),
        None => None,
    };
    Some(Named { id: jwk.common.key_id, algorithm, key })
}

/// What the cache knows a token by: all of it, so that two that differ anywhere share nothing.
pub fn fingerprint(token: &str) -> [u8; 32] {
    *blake3::hash(token.as_bytes()).as_bytes()
}
