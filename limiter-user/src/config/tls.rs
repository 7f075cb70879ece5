//! `[gateway.tls]`, from its text.

use std::{collections::HashSet, ops::Range, path::PathBuf};

use super::{
    CertificateFiles, Tls, TlsHost,
    read::{Fault, Item, Section},
    value,
};

/// Reads `[gateway.tls]` of `gateway`. Gives the places of the certificates, in the order of [`Tls::files`].
pub(super) fn parse(gateway: &mut Section, tls: &mut Option<Tls>) -> Vec<Range<usize>> {
    let Some(span) = gateway.item("tls").map(Item::span) else {
        // Asked for all the same, so that every key is known.
        read(gateway.section("tls"), &(0..0), tls);
        return Vec::new();
    };
    read(gateway.section("tls"), &span, tls)
}

fn read(mut section: Section, span: &Range<usize>, tls: &mut Option<Tls>) -> Vec<Range<usize>> {
    let mut certificate = None;
    let mut key = None;
    let place = section.read("certificate", &mut certificate, value::optional_path);
    section.read("key", &mut key, value::optional_path);
    let mut hosts = Vec::new();
    let mut places = vec![place.clone().unwrap_or_else(|| span.clone())];
    let mut names = HashSet::new();
    for (span, host) in section.sections("hosts") {
        let Some((host, place)) = read_host(host, &span) else { continue };
        if !names.insert(host.name.clone()) {
            section.complain(&span, "hosts", &format!("{:?} has a certificate already", host.name));
        }
        hosts.push(host);
        places.push(place);
    }
    let given = |key: &str, section: &mut Section, value: &Option<PathBuf>| match key {
        "certificate" => value.is_some() || section.item("certificate").is_some_and(is_wrong),
        _ => value.is_some() || section.item("key").is_some_and(is_wrong),
    };
    let (has_certificate, has_key) =
        (given("certificate", &mut section, &certificate), given("key", &mut section, &key));
    match (has_certificate, has_key) {
        (true, false) => section.complain(span, "key", "a certificate is of no use without its key"),
        (false, true) => section.complain(span, "certificate", "a key is of no use without its certificate"),
        (false, false) if !hosts.is_empty() => {
            section.complain(span, "certificate", "needed, too: it is for clients that name no host, or none of these");
        }
        _ => {}
    }
    section.finish();
    let (Some(certificate), Some(key)) = (certificate, key) else { return Vec::new() };
    *tls = Some(Tls { default: CertificateFiles { certificate, key }, hosts });
    places
}

/// Whether it is there and no good, which is one complaint and not two.
fn is_wrong(item: &Item) -> bool {
    value::optional_path(item).is_err()
}

fn read_host(mut section: Section, span: &Range<usize>) -> Option<(TlsHost, Range<usize>)> {
    let mut name = None;
    let mut certificate = None;
    let mut key = None;
    for wanted in ["name", "certificate", "key"] {
        if section.item(wanted).is_none() {
            section.complain(span, wanted, "every one of gateway.tls.hosts needs it");
        }
    }
    section.read("name", &mut name, |item| host_name(item).map(Some));
    let place = section.read("certificate", &mut certificate, |item| value::absolute_path(item).map(Some));
    section.read("key", &mut key, |item| value::absolute_path(item).map(Some));
    section.finish();
    let files = CertificateFiles { certificate: certificate?, key: key? };
    Some((TlsHost { name: name?, files }, place?))
}

fn host_name(item: &Item) -> Result<String, Fault> {
    let what = r#"the name of a host, such as "chat.example.com" or "*.example.com""#;
    let name = value::text(item, what)?.to_ascii_lowercase();
    let plain = name.strip_prefix("*.").unwrap_or(&name);
    let is_good = plain
        .split('.')
        .all(|label| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')));
    let is_address = plain.parse::<std::net::IpAddr>().is_ok();
    if is_good && !is_address { Ok(name) } else { Err(value::expected(item, what)) }
}
