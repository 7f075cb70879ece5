use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn load(kind: &str, content: &[u8]) -> Result<TokenKeys, String> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("key");
    fs::write(&path, content).unwrap();
    let jwt = match kind {
        "public" => Jwt { public_keys: vec![path], ..Jwt::default() },
        "secret" => Jwt { secrets: vec![path], ..Jwt::default() },
        _ => Jwt { jwks: Some(path), ..Jwt::default() },
    };
    TokenKeys::load(&jwt).map_err(|error| error.to_string())
}

#[test]
fn what_is_wrong_with_a_key_is_told_and_nothing_of_it() {
    let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let pem = rcgen::KeyPair::generate().unwrap().public_key_pem();
    let (short, two) = ("s".repeat(31), format!("{pem}{pem}"));
    let short_rsa = serde_json::json!({"keys": [{"kty": "RSA", "n": "q".repeat(172), "e": "AQAB"}]}).to_string();
    let many = serde_json::json!({"k": "A".repeat(43), "kty": "oct"});
    let many = serde_json::json!({"keys": vec![many; 65]}).to_string();
    let p384_private = p384.serialize_pem();
    let p384 = p384.public_key_pem();
    for (kind, content, expected) in [
        ("public", "", "expected a public key in PEM form"),
        ("public", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "expected a public key in PEM form"),
        ("public", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "expected a public key"),
        ("public", &p384, "on the curve P-256"),
        ("public", &p384_private, "there is a private key in it"),
        ("public", &two, "more than one key"),
        ("secret", "", "32 bytes at least"),
        ("secret", &short, "32 bytes at least"),
        ("secret", &pem, "public keys go into public_keys"),
        ("jwks", "", "expected a JSON Web Key Set"),
        ("jwks", "{\"keys\": {}}", "expected a JSON Web Key Set"),
        ("jwks", "{\"keys\": []}", "it has no key for RS256"),
        (
            "jwks",
            "{\"keys\": [5, {\"kty\": \"RSA\", \"n\": \"AA\", \"e\": \"AQAB\", \"alg\": \"RS512\"}]}",
            "no key for",
        ),
        ("jwks", "{\"keys\": [{\"kty\": \"oct\", \"k\": \"c2hvcnQ\"}]}", "32 bytes at least"),
        ("jwks", "{\"keys\": [{\"kty\": \"oct\", \"k\": \"!\"}]}", "not in base64url"),
        ("jwks", "{\"keys\": [{\"kty\": \"EC\", \"crv\": \"P-256\", \"x\": \"AA\", \"y\": \"AA\"}]}", "curve P-256"),
        ("jwks", &short_rsa, "2048 bits at least"),
        ("jwks", &many, "there may be 64 at most"),
    ] {
        let error = load(kind, content.as_bytes()).unwrap_err();
        assert!(error.contains(expected), "{kind} {content}: {error}");
        assert!(content.is_empty() || !error.contains(content), "{error}");
    }
}

#[test]
fn the_newline_at_the_end_of_a_secret_is_no_part_of_it() {
    let id = |content: &[u8]| load("secret", content).unwrap().0[0].id();
    let secret = b"0123456789abcdef0123456789abcdef";
    let with = |end: &[u8]| [secret, end].concat();
    assert_eq!(id(secret), id(&with(b"\n")));
    assert_eq!(id(secret), id(&with(b"\r\n")));
    assert_ne!(id(secret), id(&with(b" ")));
    assert_ne!(id(secret), id(&with(b"\n\n")));
}

#[test]
fn a_key_is_not_shown() {
    let keys = load("secret", b"0123456789abcdef0123456789abcdef").unwrap();
    let shown = format!("{keys:?}");
    assert!(shown.contains("HS256") && !shown.contains("0123") && !shown.contains("48, 49"), "{shown}");
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(content in prop::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,200}") {
        for kind in ["public", "secret", "jwks"] {
            let _ = load(kind, &content);
            let _ = load(kind, text.as_bytes());
            let _ = load(kind, format!("{{\"keys\": [{text}]}}").as_bytes());
            let _ = load(kind, format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n").as_bytes());
        }
    }
}
