use std::fs;

use tempfile::TempDir;

use super::*;

/// A certificate for `name` and its key, in a folder of their own.
fn files(name: &str) -> (TempDir, CertificateFiles) {
    let folder = TempDir::new().unwrap();
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let files = CertificateFiles { certificate: folder.path().join("cert.pem"), key: folder.path().join("key.pem") };
    fs::write(&files.certificate, made.cert.pem()).unwrap();
    fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    (folder, files)
}

fn refused(files: &CertificateFiles, name: Option<&str>) -> String {
    files.load(name).unwrap_err().to_string()
}

#[test]
fn a_pair_is_taken_for_the_names_that_it_is_for() {
    let (_folder, files) = files("*.example.com");
    for name in [None, Some("a.example.com"), Some("*.example.com")] {
        files.load(name).unwrap();
    }
    for name in ["example.com", "a.b.example.com", "*.example.org", "not a name"] {
        assert!(refused(&files, Some(name)).ends_with(&format!("cert.pem is not for {name}")), "{name}");
    }
}

#[test]
fn what_is_wrong_is_told_with_its_file() {
    let (_folder, good) = files("localhost");
    let (_other_folder, other) = files("localhost");
    let mixed = CertificateFiles { key: other.key.clone(), ..good.clone() };
    let text = refused(&mixed, None);
    assert!(text.contains("does not belong to the certificate"), "{text}");
    assert!(text.contains(&format!("{}", good.certificate.display())), "{text}");

    let missing = CertificateFiles { key: "/nowhere/key.pem".into(), ..good.clone() };
    assert!(refused(&missing, None).starts_with("cannot read /nowhere/key.pem: No such file"));
    let swapped = CertificateFiles { certificate: good.key.clone(), key: good.certificate.clone() };
    assert!(refused(&swapped, None).contains("key.pem has no certificate in PEM form"));
    let no_key = CertificateFiles { key: good.certificate.clone(), ..good.clone() };
    assert!(refused(&no_key, None).contains("cert.pem has no private key in PEM form"));

    for (key, expected) in [
        ("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", "is encrypted"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "cannot be used"),
        ("-----BEGIN PRIVATE KEY-----\n!", "has no private key"),
        ("", "has no private key"),
    ] {
        fs::write(&other.key, key).unwrap();
        assert!(refused(&other, None).contains(expected), "{key:?} gave {}", refused(&other, None));
    }
    for (certificate, expected) in [
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be used"),
        ("-----BEGIN CERTIFICATE-----\n!", "has no certificate"),
        ("", "has no certificate"),
    ] {
        fs::write(&other.certificate, certificate).unwrap();
        assert!(refused(&other, None).contains(expected), "{certificate:?} gave {}", refused(&other, None));
    }
}
