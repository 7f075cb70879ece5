//! The keys that JSON Web Tokens are checked with, as `[gateway.auth.jwt]` names them.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};
use ring::{
    digest, hmac,
    signature::{
        ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
    },
};
use serde_json::Value;

use super::{Jwt, bounded};

/// Longest file that is read; a set of many keys has some dozen KiB.
const LONGEST_FILE_BYTES: u64 = 1 << 20;

/// Most keys: a token that does not say which one it is signed with is tried with each.
const MOST_KEYS: usize = 64;

/// As many as HS256's hash has (RFC 7518, 3.2).
const SHORTEST_SECRET_BYTES: usize = 32;

/// Bytes of a modulus of 2048 bits (RFC 7518, 3.3).
const SHORTEST_MODULUS_BYTES: usize = 256;

const ED25519_BYTES: usize = 32;

/// An uncompressed point on P-256.
const P256_BYTES: usize = 65;

/// Every key that is in force.
#[derive(Clone, Debug, Default)]
pub struct TokenKeys(Vec<TokenKey>);

/// A key with the one algorithm that it is for: what a token says of itself chooses no algorithm (RFC 8725, 3.1).
#[derive(Clone)]
pub struct TokenKey {
    /// A hash of the key and its algorithm.
    id: [u8; 32],
    /// What tokens call it.
    name: Option<String>,
    material: Material,
}

#[derive(Clone)]
enum Material {
    Hs256(hmac::Key),
    Rs256Der(UnparsedPublicKey<Vec<u8>>),
    Rs256Components(RsaPublicKeyComponents<Vec<u8>>),
    Es256(UnparsedPublicKey<Vec<u8>>),
    EdDsa(UnparsedPublicKey<Vec<u8>>),
}

/// Why keys can't be used. Says which file, and never what is in it.
#[derive(Debug, thiserror::Error)]
pub enum TokenKeyError {
    /// A file can't be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// The file has no key that can be used.
    #[error("{}: {problem}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// There are more keys than are ever needed.
    #[error("there are {0} keys, and there may be {MOST_KEYS} at most: a token is tried with each")]
    TooMany(usize),
}

impl TokenKeys {
    /// Reads every file.
    ///
    /// # Errors
    /// [`TokenKeyError`] names the file at fault.
    pub fn load(jwt: &Jwt) -> Result<Self, TokenKeyError> {
        let mut keys = Vec::new();
        for path in &jwt.public_keys {
            keys.push(public_key(&text(path)?).map_err(|problem| unusable(path, problem))?);
        }
        for path in &jwt.secrets {
            keys.push(secret(&bytes(path)?).map_err(|problem| unusable(path, problem))?);
        }
        if let Some(path) = &jwt.jwks {
            keys.extend(key_set(&text(path)?).map_err(|problem| unusable(path, problem))?);
        }
        if keys.len() > MOST_KEYS {
            return Err(TokenKeyError::TooMany(keys.len()));
        }
        Ok(Self(keys))
    }

    /// The keys that a token with this head may be signed with. One that has no name, or whose token names none, may be.
    pub fn candidates(&self, algorithm: Algorithm, name: Option<&str>) -> impl Iterator<Item = &TokenKey> {
        self.0.iter().filter(move |key| {
            key.algorithm() == algorithm && key.name.as_deref().is_none_or(|own| name.is_none_or(|name| name == own))
        })
    }

    /// Whether the key of that [`TokenKey::id`] is still in force.
    pub fn has(&self, id: &[u8; 32]) -> bool {
        self.0.iter().any(|key| key.id == *id)
    }
}

impl TokenKey {
    fn new(name: Option<String>, material: Material, bytes: &[&[u8]]) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        // An algorithm and a length ahead of each part, so that no two keys are hashed alike.
        hash.update(&[material.tag()]);
        for part in bytes {
            hash.update(&part.len().to_le_bytes());
            hash.update(part);
        }
        let mut id = [0; 32];
        id.copy_from_slice(hash.finish().as_ref());
        Self { id, name, material }
    }

    /// Which key it is, for as long as it is in force: a hash.
    pub fn id(&self) -> [u8; 32] {
        self.id
    }

    /// The algorithm of every token that is signed with it.
    pub fn algorithm(&self) -> Algorithm {
        match self.material {
            Material::Hs256(_) => Algorithm::HS256,
            Material::Rs256Der(_) | Material::Rs256Components(_) => Algorithm::RS256,
            Material::Es256(_) => Algorithm::ES256,
            Material::EdDsa(_) => Algorithm::EdDSA,
        }
    }

    /// Whether `signature` is this key's of `message`. Takes the same time for every wrong one of a shared secret.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Hs256(key) => hmac::verify(key, message, signature).is_ok(),
            Material::Rs256Components(key) => key.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature).is_ok(),
            Material::Rs256Der(key) | Material::Es256(key) | Material::EdDsa(key) => {
                key.verify(message, signature).is_ok()
            }
        }
    }
}

impl Material {
    fn tag(&self) -> u8 {
        match self {
            Self::Hs256(_) => 1,
            Self::Rs256Der(_) => 2,
            Self::Rs256Components(_) => 3,
            Self::Es256(_) => 4,
            Self::EdDsa(_) => 5,
        }
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey")
            .field("name", &self.name)
            .field("algorithm", &self.algorithm())
            .finish_non_exhaustive()
    }
}

fn unusable(path: &Path, problem: &'static str) -> TokenKeyError {
    TokenKeyError::Unusable { path: path.to_owned(), problem }
}

fn bytes(path: &Path) -> Result<Vec<u8>, TokenKeyError> {
    bounded::read(path, LONGEST_FILE_BYTES).map_err(|error| TokenKeyError::Unreadable { path: path.to_owned(), error })
}

fn text(path: &Path) -> Result<String, TokenKeyError> {
    String::from_utf8(bytes(path)?).map_err(|_| unusable(path, "it is not a text file"))
}

/// A public key in PEM.
fn public_key(pem: &str) -> Result<TokenKey, &'static str> {
    const WRONG: &str = "expected a public key in PEM form (-----BEGIN PUBLIC KEY-----): RSA, P-256 or Ed25519";
    if pem.contains("PRIVATE KEY-----") {
        return Err("there is a private key in it, which has no business here: give the public one (`openssl pkey \
                    -pubout` makes it)");
    }
    if pem.matches("-----BEGIN").count() > 1 {
        return Err("there is more than one key in it: give each a file of its own");
    }
    if !(pem.contains("-----BEGIN PUBLIC KEY-----") || pem.contains("-----BEGIN RSA PUBLIC KEY-----")) {
        return Err(WRONG);
    }
    let pem = pem.as_bytes();
    let read = DecodingKey::from_rsa_pem(pem)
        .map(|key| (key, Algorithm::RS256))
        .or_else(|_| DecodingKey::from_ec_pem(pem).map(|key| (key, Algorithm::ES256)))
        .or_else(|_| DecodingKey::from_ed_pem(pem).map(|key| (key, Algorithm::EdDSA)));
    let (key, algorithm) = read.map_err(|_| WRONG)?;
    of(None, algorithm, key.kind())
}

/// A shared secret: the file's bytes, but for the newline that editors put at the end.
fn secret(bytes: &[u8]) -> Result<TokenKey, &'static str> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    if bytes.starts_with(b"-----BEGIN") {
        // Who signs with RSA and gives the public key here would have everybody sign who knows it.
        return Err("this is a PEM file, not a shared secret: public keys go into public_keys");
    }
    hs256(None, bytes)
}

fn hs256(name: Option<String>, bytes: &[u8]) -> Result<TokenKey, &'static str> {
    if bytes.len() < SHORTEST_SECRET_BYTES {
        return Err("a shared secret has 32 bytes at least (`openssl rand -hex 32` makes one)");
    }
    Ok(TokenKey::new(name, Material::Hs256(hmac::Key::new(hmac::HMAC_SHA256, bytes)), &[bytes]))
}

/// The keys of a JSON Web Key Set. Those that are for something else are passed over (RFC 7517, section 5).
fn key_set(text: &str) -> Result<Vec<TokenKey>, &'static str> {
    const WRONG: &str = r#"expected a JSON Web Key Set: {"keys": [...]}"#;
    let set: Value = serde_json::from_str(text).map_err(|_| WRONG)?;
    let keys = set.get("keys").and_then(Value::as_array).ok_or(WRONG)?;
    let mut usable = Vec::new();
    for key in keys {
        // What we can't read may well be for somebody else.
        let Ok(jwk) = serde_json::from_value::<Jwk>(key.clone()) else { continue };
        usable.extend(of_jwk(&jwk)?);
    }
    if usable.is_empty() {
        return Err("it has no key for RS256, ES256, EdDSA (Ed25519) or HS256");
    }
    Ok(usable)
}

/// `None`: the key is for something else. An error: it is ours and no good.
fn of_jwk(jwk: &Jwk) -> Result<Option<TokenKey>, &'static str> {
    if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
        return Ok(None);
    }
    let (algorithm, known_as) = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
        }
        AlgorithmParameters::OctetKey(_) => (Algorithm::HS256, KeyAlgorithm::HS256),
        _ => return Ok(None),
    };
    if jwk.common.key_algorithm.is_some_and(|named| named != known_as) {
        return Ok(None);
    }
    let key = DecodingKey::from_jwk(jwk).map_err(|_| "one of its keys is not in base64url")?;
    of(jwk.common.key_id.clone(), algorithm, key.kind()).map(Some)
}

fn of(name: Option<String>, algorithm: Algorithm, kind: &DecodingKeyKind) -> Result<TokenKey, &'static str> {
    const SHORT: &str = "an RSA key for tokens has 2048 bits at least";
    let material = match (algorithm, kind) {
        (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, e }) => {
            let zeros = n.iter().take_while(|byte| **byte == 0).count();
            let n = n[zeros..].to_vec();
            if n.len() < SHORTEST_MODULUS_BYTES {
                return Err(SHORT);
            }
            Material::Rs256Components(RsaPublicKeyComponents { n, e: e.clone() })
        }
        (Algorithm::HS256, DecodingKeyKind::SecretOrDer(bytes)) => return hs256(name, bytes),
        (Algorithm::RS256, DecodingKeyKind::SecretOrDer(der)) if der.len() < SHORTEST_MODULUS_BYTES => {
            return Err(SHORT);
        }
        (Algorithm::RS256, DecodingKeyKind::SecretOrDer(der)) => {
            Material::Rs256Der(UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, der.clone()))
        }
        (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) if point.len() == P256_BYTES => {
            Material::Es256(UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point.clone()))
        }
        (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(point)) if point.len() == ED25519_BYTES => {
            Material::EdDsa(UnparsedPublicKey::new(&ED25519, point.clone()))
        }
        (Algorithm::ES256, _) => return Err("an elliptic curve key for tokens is on the curve P-256"),
        _ => return Err("an Edwards curve key for tokens is on Ed25519"),
    };
    Ok(match kind {
        DecodingKeyKind::SecretOrDer(bytes) => TokenKey::new(name, material, &[bytes]),
        DecodingKeyKind::RsaModulusExponent { n, e } => TokenKey::new(name, material, &[n, e]),
    })
}

#[cfg(test)]
#[path = "token_keys_tests.rs"]
mod tests;
