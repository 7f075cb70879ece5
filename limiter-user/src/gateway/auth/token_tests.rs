use std::fs;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::{
    super::signing::{Signer, now, unsigned},
    *,
};

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// What takes the tokens of these signers.
fn tokens_of(signers: &[&Signer], config: Jwt) -> Tokens {
    let folder = TempDir::new().unwrap();
    let (mut public_keys, mut secrets) = (Vec::new(), Vec::new());
    for (i, signer) in signers.iter().enumerate() {
        let path = signer.write(folder.path(), &i.to_string());
        if let Signer::Hs256(_) = signer { secrets.push(path) } else { public_keys.push(path) }
    }
    Tokens::new(&Jwt { public_keys, secrets, ..config }).unwrap()
}

fn plain() -> Jwt {
    Jwt { leeway: Duration::ZERO, ..Jwt::default() }
}

#[test]
fn each_algorithm_is_taken_from_a_file_and_from_a_key_set() {
    for signer in [Signer::hs256(), Signer::rs256(), Signer::es256(), Signer::eddsa()] {
        let token = signer.token(&json!({"sub": "alice", "exp": 1000}));
        let found = tokens_of(&[&signer], plain()).verify(&token, at(999)).unwrap();
        assert_eq!((&*found.user, found.expires), ("alice", at(1000)), "{}", signer.algorithm());

        let folder = TempDir::new().unwrap();
        let jwks = folder.path().join("jwks.json");
        let set = json!({"keys": [
            {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"},
            {"kty": "AKP", "pub": "AA"},
            {"kty": "RSA", "n": "AA", "e": "AQAB", "use": "enc"},
            signer.jwk("a"),
        ]});
        fs::write(&jwks, set.to_string()).unwrap();
        let tokens = Tokens::new(&Jwt { jwks: Some(jwks), ..plain() }).unwrap();
        assert_eq!(&*tokens.verify(&token, at(999)).unwrap().user, "alice", "{}", signer.algorithm());
        for (kid, good) in [("a", true), ("b", false)] {
            let head = json!({"alg": signer.algorithm(), "kid": kid});
            let token = signer.token_with(&head, &json!({"sub": "alice", "exp": 1000}));
            assert_eq!(tokens.verify(&token, at(999)).is_ok(), good, "{} {kid}", signer.algorithm());
        }
    }
}

/// Whoever knows the public key could else sign with it as if it were a shared secret.
#[test]
fn what_a_token_says_of_its_algorithm_chooses_none() {
    let signers = [Signer::rs256(), Signer::es256(), Signer::eddsa()];
    let tokens = tokens_of(&[&signers[0], &signers[1], &signers[2]], plain());
    let claims = json!({"sub": "mallory", "exp": 1000});
    for signer in &signers {
        let pem = signer.key_file();
        let trimmed = pem.trim_ascii_end().to_vec();
        for secret in [pem, trimmed] {
            let forged = Signer::Hs256(secret).token(&claims);
            assert_eq!(tokens.verify(&forged, at(1)).unwrap_err(), Rejection::Signature);
        }
        for other in ["HS256", "HS512", "RS256", "RS512", "PS256", "ES256", "ES384", "EdDSA"] {
            if other != signer.algorithm() {
                let token = signer.token_with(&json!({"alg": other}), &claims);
                assert_eq!(tokens.verify(&token, at(1)).unwrap_err(), Rejection::Signature, "{other}");
            }
        }
    }
    for head in
        [json!({"alg": "none"}), json!({"alg": "None"}), json!({"alg": ""}), json!({}), json!([]), json!("HS256")]
    {
        let message = unsigned(&head, &claims);
        for token in [format!("{message}."), message.clone(), format!("{message}.AA")] {
            assert_eq!(tokens.verify(&token, at(1)).unwrap_err(), Rejection::Malformed, "{head}");
        }
    }
}

#[test]
fn a_token_that_brings_its_own_key_or_asks_for_more_is_not_taken() {
    let (ours, theirs) = (Signer::es256(), Signer::es256());
    let tokens = tokens_of(&[&ours], plain());
    let claims = json!({"sub": "mallory", "exp": 1000});
    let own_key = json!({"alg": "ES256", "jwk": theirs.jwk("x"), "jku": "https://example.com/keys"});
    assert_eq!(tokens.verify(&theirs.token_with(&own_key, &claims), at(1)).unwrap_err(), Rejection::Signature);
    let critical = json!({"alg": "ES256", "crit": ["b64"], "b64": false});
    assert_eq!(tokens.verify(&ours.token_with(&critical, &claims), at(1)).unwrap_err(), Rejection::Malformed);
}

#[test]
fn every_changed_bit_is_noticed() {
    let signer = Signer::hs256();
    let tokens = tokens_of(&[&signer], plain());
    let token = signer.token(&json!({"sub": "alice", "exp": 1000}));
    tokens.verify(&token, at(1)).unwrap();
    for i in 0..token.len() {
        let mut bytes = token.clone().into_bytes();
        bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(bytes).unwrap();
        // The last digit has bits that stand for nothing; the decoder insists on zeros there.
        assert!(tokens.verify(&changed, at(1)).is_err(), "{i}");
    }
    assert_eq!(tokens.verify(&format!("{token}{}", "A".repeat(9000)), at(1)).unwrap_err(), Rejection::Malformed);
}

#[test]
fn claims_are_held_against_the_configuration() {
    let signer = Signer::hs256();
    let strict = || Jwt {
        issuers: vec!["https://id.example.com".into()],
        audiences: vec!["chat".into(), "game".into()],
        leeway: Duration::from_secs(30),
        ..Jwt::default()
    };
    let good = json!({"sub": "alice", "exp": 1000, "iss": "https://id.example.com", "aud": "chat"});
    let with = |changes: &Value| {
        let mut claims = good.clone();
        for (key, value) in changes.as_object().unwrap() {
            claims[key] = value.clone();
        }
        claims
    };
    let strict = tokens_of(&[&signer], strict());
    let outcome = |changes: Value, now| strict.verify(&signer.token(&with(&changes)), at(now)).map(|token| token.user);
    for (changes, now) in [
        (json!({}), 0),
        (json!({}), 1029),
        (json!({"exp": 1000.9}), 1030),
        (json!({"exp": 1e300}), 2000),
        (json!({"nbf": 50}), 20),
        (json!({"aud": ["other", "game"]}), 0),
        (json!({"sub": 17}), 0),
        (json!({"sub": "\u{e4}\u{1f600} b"}), 0),
    ] {
        assert!(outcome(changes.clone(), now).is_ok(), "{changes} at {now}");
    }
    for (changes, now, expected) in [
        (json!({}), 1030, Rejection::Expired),
        (json!({"exp": null}), 0, Rejection::Expired),
        (json!({"exp": "1000"}), 0, Rejection::Expired),
        (json!({"exp": -1}), 0, Rejection::Expired),
        (json!({"nbf": 51}), 20, Rejection::NotYet),
        (json!({"nbf": "0"}), 20, Rejection::NotYet),
        (json!({"iss": "https://id.example.org"}), 0, Rejection::Issuer),
        (json!({"iss": ["https://id.example.com"]}), 0, Rejection::Issuer),
        (json!({"iss": 7}), 0, Rejection::Issuer),
        (json!({"iss": null}), 0, Rejection::Issuer),
        (json!({"aud": "cha"}), 0, Rejection::Audience),
        (json!({"aud": []}), 0, Rejection::Audience),
        (json!({"aud": null}), 0, Rejection::Audience),
        (json!({"aud": [["chat"]]}), 0, Rejection::Audience),
        (json!({"sub": ""}), 0, Rejection::User),
        (json!({"sub": " alice"}), 0, Rejection::User),
        (json!({"sub": "a\nb"}), 0, Rejection::User),
        (json!({"sub": "\u{9b}"}), 0, Rejection::User),
        (json!({"sub": "a".repeat(129)}), 0, Rejection::User),
        (json!({"sub": ["alice"]}), 0, Rejection::User),
        (json!({"sub": null}), 0, Rejection::User),
    ] {
        assert_eq!(outcome(changes.clone(), now), Err(expected), "{changes} at {now}");
    }

    // What was meant for somebody in particular is not for us.
    let open = tokens_of(&[&signer], plain());
    assert_eq!(open.verify(&signer.token(&good), at(0)).unwrap_err(), Rejection::Audience);
    open.verify(&signer.token(&json!({"sub": "alice", "exp": 1000})), at(0)).unwrap();
    let by_mail = tokens_of(&[&signer], Jwt { user_claim: "email".into(), ..plain() });
    let token = signer.token(&json!({"sub": "1", "email": "a@example.com", "exp": 1000}));
    assert_eq!(&*by_mail.verify(&token, at(0)).unwrap().user, "a@example.com");
}

#[test]
fn a_reload_takes_new_keys_and_keeps_the_old_ones_if_they_are_no_good() {
    let folder = TempDir::new().unwrap();
    let (first, second) = (Signer::es256(), Signer::es256());
    let path = first.write(folder.path(), "key.pem");
    let tokens = Tokens::new(&Jwt { public_keys: vec![path.clone()], ..plain() }).unwrap();
    let good = |signer: &Signer| tokens.verify(&signer.token_of("alice", 60), at(now()));
    let key = good(&first).unwrap().key;
    assert!(good(&second).is_err() && tokens.knows(&key));

    fs::write(&path, "nonsense").unwrap();
    tokens.reload().unwrap_err();
    assert!(good(&first).is_ok() && tokens.knows(&key));

    second.write(folder.path(), "key.pem");
    tokens.reload().unwrap();
    assert!(good(&first).is_err() && good(&second).is_ok() && !tokens.knows(&key));
}

proptest! {
    #[test]
    fn no_text_is_taken_or_makes_it_panic(text in "\\PC{0,300}", parts in prop::collection::vec("[A-Za-z0-9_=-]{0,80}", 0..6)) {
        let signer = Signer::hs256();
        let tokens = tokens_of(&[&signer], plain());
        prop_assert!(tokens.verify(&text, at(0)).is_err());
        prop_assert!(tokens.verify(&parts.join("."), at(0)).is_err());
    }

    #[test]
    fn no_signed_nonsense_makes_it_panic(head in "\\PC{0,60}", claims in "\\PC{0,60}", exp in any::<f64>(), nbf in any::<i64>()) {
        let signer = Signer::hs256();
        let tokens = tokens_of(&[&signer], plain());
        for (head, claims) in [
            (json!({"alg": "HS256", "kid": head, "typ": claims}), json!({"sub": claims, "exp": exp, "nbf": nbf})),
            (json!({"alg": "HS256", "x5c": [head]}), json!([claims])),
            (json!({"alg": head}), json!({"exp": claims})),
        ] {
            let _ = tokens.verify(&signer.token_with(&head, &claims), at(0));
        }
    }
}
