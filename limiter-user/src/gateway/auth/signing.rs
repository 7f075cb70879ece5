//! Keys that sign tokens, for tests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};
use ring::{
    hmac,
    rand::SystemRandom,
    rsa,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256},
};
use serde_json::{Value, json};

pub enum Signer {
    Hs256(Vec<u8>),
    Rs256(Box<rsa::KeyPair>, String),
    Es256(EcdsaKeyPair, String),
    EdDsa(Ed25519KeyPair, String),
}

impl Signer {
    pub fn hs256() -> Self {
        Self::Hs256((0..32).map(|_| fastrand::u8(b'!'..=b'~')).collect())
    }

    pub fn rs256() -> Self {
        let pem = openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"], "");
        let public = openssl(&["pkey", "-pubout"], &pem);
        let der = rustls::pki_types::pem::PemObject::from_pem_slice(pem.as_bytes());
        let der: rustls::pki_types::PrivatePkcs8KeyDer = der.unwrap();
        Self::Rs256(Box::new(rsa::KeyPair::from_pkcs8(der.secret_pkcs8_der()).unwrap()), public)
    }

    pub fn es256() -> Self {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let der = pair.serialize_der();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der, &SystemRandom::new()).unwrap();
        Self::Es256(key, pair.public_key_pem())
    }

    pub fn eddsa() -> Self {
        let pair = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&pair.serialize_der()).unwrap();
        Self::EdDsa(key, pair.public_key_pem())
    }

    pub fn algorithm(&self) -> &'static str {
        match self {
            Self::Hs256(_) => "HS256",
            Self::Rs256(..) => "RS256",
            Self::Es256(..) => "ES256",
            Self::EdDsa(..) => "EdDSA",
        }
    }

    /// What goes into a file of `public_keys`, or of `secrets` for HS256.
    pub fn key_file(&self) -> Vec<u8> {
        match self {
            Self::Hs256(secret) => secret.clone(),
            Self::Rs256(_, pem) | Self::Es256(_, pem) | Self::EdDsa(_, pem) => pem.clone().into_bytes(),
        }
    }

    /// The same as a JSON Web Key of that name.
    pub fn jwk(&self, kid: &str) -> Value {
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match self {
            Self::Hs256(secret) => json!({"kty": "oct", "kid": kid, "k": encode(secret)}),
            Self::Rs256(key, _) => {
                let parts = rsa::PublicKeyComponents::<Vec<u8>>::from(key.public_key());
                json!({"kty": "RSA", "kid": kid, "n": encode(&parts.n), "e": encode(&parts.e), "use": "sig"})
            }
            Self::Es256(key, _) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(32);
                json!({"kty": "EC", "crv": "P-256", "kid": kid, "x": encode(x), "y": encode(y), "alg": "ES256"})
            }
            Self::EdDsa(key, _) => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": encode(key.public_key().as_ref())})
            }
        }
    }

    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Hs256(secret) => hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message).as_ref().to_vec(),
            Self::Rs256(key, _) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                signature
            }
            Self::Es256(key, _) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::EdDsa(key, _) => key.sign(message).as_ref().to_vec(),
        }
    }

    /// A token with these claims.
    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({"alg": self.algorithm()}), claims)
    }

    /// A token with this head, whatever that says.
    pub fn token_with(&self, head: &Value, claims: &Value) -> String {
        let message = unsigned(head, claims);
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(self.sign(message.as_bytes())))
    }

    /// A token of that user, that is good for so many seconds.
    pub fn token_of(&self, user: &str, seconds: u64) -> String {
        self.token(&json!({"sub": user, "exp": now() + seconds}))
    }

    pub fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        // Replaced as tools do it, so that it is another file whatever the clock says.
        let new = folder.join(format!("{name}.new"));
        fs::write(&new, self.key_file()).unwrap();
        fs::rename(new, &path).unwrap();
        path
    }
}

/// The first two parts of a token.
pub fn unsigned(head: &Value, claims: &Value) -> String {
    format!("{}.{}", URL_SAFE_NO_PAD.encode(head.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()))
}

/// Seconds of the wall clock.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn openssl(arguments: &[&str], input: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("input");
    fs::write(&file, input).unwrap();
    let output = Command::new("openssl")
        .args(arguments)
        .stdin(fs::File::open(&file).unwrap())
        .stderr(Stdio::null())
        .output()
        .expect("openssl is installed");
    assert!(output.status.success(), "openssl {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}
