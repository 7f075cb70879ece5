use std::{fs, path::Path};

use tempfile::TempDir;

use super::*;
use crate::config::{CertificateFiles, TlsHost};

/// Writes a new certificate for `name` and its key into `folder`.
fn write(folder: &Path, name: &str) -> CertificateFiles {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let file = |kind: &str| folder.join(format!("{}.{kind}", name.replace('*', "star")));
    let files = CertificateFiles { certificate: file("pem"), key: file("key") };
    fs::write(&files.certificate, made.cert.pem()).unwrap();
    fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    files
}

fn der(certified: &CertifiedKey) -> Vec<u8> {
    certified.cert[0].to_vec()
}

#[test]
fn a_name_gets_its_own_certificate_and_others_the_default() {
    let folder = TempDir::new().unwrap();
    let host = |name: &str| TlsHost { name: name.to_owned(), files: write(folder.path(), name) };
    let files = config::Tls {
        default: write(folder.path(), "default.example.com"),
        hosts: vec![host("*.example.com"), host("a.example.com"), host("b.example.org")],
    };
    let set = Set::load(&files).unwrap();
    let chosen = |name| der(set.choose(name));
    let of = |i: usize| der(&set.hosts[i].1);
    assert_eq!(chosen(Some("a.example.com")), of(1));
    assert_eq!(chosen(Some("A.Example.COM")), of(1));
    assert_eq!(chosen(Some("c.example.com")), of(0));
    assert_eq!(chosen(Some("b.example.org")), of(2));
    for name in [None, Some("example.com"), Some("x.y.example.com"), Some("b.example.net"), Some(""), Some(".")] {
        assert_eq!(chosen(name), der(&set.default), "{name:?}");
    }
}

#[test]
fn new_files_are_taken_when_they_have_settled_and_bad_ones_are_told_once() {
    let folder = TempDir::new().unwrap();
    let default = write(folder.path(), "localhost");
    let tls = Tls::new(&config::Tls { default: default.clone(), hosts: Vec::new() }).unwrap();
    let in_use = || der(&tls.certificates.0.read().unwrap().default);
    let mut watch = tls.watch.clone();
    let mut look = || watch.changed().then(|| tls.reload());
    let first = in_use();
    assert!(look().is_none());

    // Replaced as tools do it, so that it is another file whatever the clock says.
    let replace = |path: &Path, content: &[u8]| {
        let new = folder.path().join("new");
        fs::write(&new, content).unwrap();
        fs::rename(new, path).unwrap();
    };
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    replace(&default.certificate, other.cert.pem().as_bytes());
    assert!(look().is_none(), "the key may be under way");
    let error = look().unwrap().unwrap_err();
    assert!(matches!(error, CertificateError::Mismatch { .. }), "{error}");
    assert_eq!(in_use(), first, "the old one stays");
    assert!(look().is_none(), "told once");

    replace(&default.key, other.signing_key.serialize_pem().as_bytes());
    assert!(look().is_none());
    look().unwrap().unwrap();
    assert_eq!(in_use(), other.cert.der().to_vec());
    assert!(look().is_none());

    fs::remove_file(&default.key).unwrap();
    assert!(look().is_none());
    assert!(matches!(look().unwrap(), Err(CertificateError::Unreadable { .. })));
    assert_eq!(in_use(), other.cert.der().to_vec());
}
