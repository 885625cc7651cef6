//! Signatures of tokens, with ring's arithmetic: what jsonwebtoken asks of a library of cryptography.

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils, verify};
use jsonwebtoken::errors::{ErrorKind, Result};
use jsonwebtoken::signature::{self, Verifier};
use jsonwebtoken::{AlgorithmFamily, DecodingKey, DecodingKeyKind, EncodingKey};
use ring::hmac;
use ring::signature::{RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm};

use super::keys::{Algorithm, Key};

static RING: CryptoProvider = CryptoProvider {
    signer_factory: no_signer,
    verifier_factory: verifier,
    // Thumbprints and keys of private keys: nobody here asks for them.
    key_utils: KeyUtils::new_unimplemented(),
};

impl Key {
    /// Whether this key has signed `message`. `signature` as it stands in the token.
    pub fn has_signed(&self, algorithm: Algorithm, message: &[u8], signature: &str) -> bool {
        // Whoever is second finds it there.
        let _ = RING.install_default();
        self.fits(algorithm) && verify(signature, message, &self.0, algorithm).unwrap_or(false)
    }
}

fn no_signer(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>> {
    Err(ErrorKind::UnsupportedAlgorithm.into())
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>> {
    if key.family() != algorithm.family() {
        return Err(ErrorKind::InvalidKeyFormat.into());
    }
    Ok(Box::new(Ring { algorithm: *algorithm, key: key.clone() }))
}

struct Ring {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl JwtVerifier for Ring {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl Verifier<Vec<u8>> for Ring {
    fn verify(&self, message: &[u8], mark: &Vec<u8>) -> std::result::Result<(), signature::Error> {
        let checked = match self.key.kind() {
            DecodingKeyKind::RsaModulusExponent { n, e } => {
                let scheme = rsa(self.algorithm).ok_or_else(signature::Error::new)?;
                RsaPublicKeyComponents { n, e }.verify(scheme, message, mark)
            }
            DecodingKeyKind::SecretOrDer(bytes) if self.algorithm.family() == AlgorithmFamily::Hmac => {
                let hash = hash(self.algorithm).ok_or_else(signature::Error::new)?;
                hmac::verify(&hmac::Key::new(hash, bytes), message, mark)
            }
            DecodingKeyKind::SecretOrDer(point) => {
                let curve = curve(self.algorithm).ok_or_else(signature::Error::new)?;
                UnparsedPublicKey::new(curve, point).verify(message, mark)
            }
        };
        checked.map_err(|_| signature::Error::new())
    }
}

fn hash(algorithm: Algorithm) -> Option<hmac::Algorithm> {
    match algorithm {
        Algorithm::HS256 => Some(hmac::HMAC_SHA256),
        Algorithm::HS384 => Some(hmac::HMAC_SHA384),
        Algorithm::HS512 => Some(hmac::HMAC_SHA512),
        _ => None,
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    match algorithm {
        Algorithm::RS256 => Some(&ring::signature::RSA_PKCS1_2048_8192_SHA256),
        Algorithm::RS384 => Some(&ring::signature::RSA_PKCS1_2048_8192_SHA384),
        Algorithm::RS512 => Some(&ring::signature::RSA_PKCS1_2048_8192_SHA512),
        Algorithm::PS256 => Some(&ring::signature::RSA_PSS_2048_8192_SHA256),
        Algorithm::PS384 => Some(&ring::signature::RSA_PSS_2048_8192_SHA384),
        Algorithm::PS512 => Some(&ring::signature::RSA_PSS_2048_8192_SHA512),
        _ => None,
    }
}

fn curve(algorithm: Algorithm) -> Option<&'static dyn VerificationAlgorithm> {
    match algorithm {
        Algorithm::ES256 => Some(&ring::signature::ECDSA_P256_SHA256_FIXED),
        Algorithm::ES384 => Some(&ring::signature::ECDSA_P384_SHA384_FIXED),
        Algorithm::EdDSA => Some(&ring::signature::ED25519),
        _ => None,
    }
}
