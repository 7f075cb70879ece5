use std::{
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
};

use super::*;
use crate::{
    config,
    gateway::{Place, Sockets},
};

fn gateway(listen: &[&str]) -> config::Gateway {
    config::Gateway {
        listen: listen.iter().map(|listen| listen.parse().unwrap()).collect(),
        ..config::Gateway::default()
    }
}

/// What the next process gets of these.
fn hand_over(spares: &[Spare]) -> Handed {
    Handed::new(spares.iter().map(|spare| (spare.label().clone(), spare.socket.try_clone().unwrap())))
}

#[test]
fn a_socket_is_known_by_what_it_was_opened_for_or_by_its_address() {
    let first = TcpListener::bind("127.0.0.1:0").unwrap();
    let second = TcpListener::bind("127.0.0.1:0").unwrap();
    let [any, at_first] = ["127.0.0.1:0".parse().unwrap(), first.local_addr().unwrap()];
    let second_at = second.local_addr().unwrap();
    let mut handed = Handed::new([(Label::tcp(at_first), first.into()), (Label::tcp(any), second.into())]);
    let found = handed.take_tcp(any).unwrap();
    assert_eq!(found.local_addr().unwrap().as_socket(), Some(second_at));
    assert!(handed.take_tcp(any).is_none(), "each is taken once");
    assert!(handed.take_tcp(second_at).is_none());
    assert!(handed.take_tcp(at_first).is_some());

    let chosen = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = chosen.local_addr().unwrap();
    let mut handed = Handed::new([(Label::tcp(any), chosen.into())]);
    assert!(handed.take_tcp(address).is_some(), "now that its port is written down");
}

#[test]
fn what_does_not_listen_is_not_taken() {
    let idle = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = idle.local_addr().unwrap();
    let mut handed = Handed::new([(Label::tcp(address), idle.into())]);
    assert!(handed.take_tcp(address).is_none());
}

#[test]
fn a_label_survives_the_way() {
    for label in [
        Label::tcp("[::1]:8080".parse().unwrap()),
        Label::new(&Listen::Unix("/run/ws.sock".into()), Some((1, u64::MAX))),
    ] {
        let text = serde_json::to_string(&label).unwrap();
        assert_eq!(serde_json::from_str::<Label>(&text).unwrap(), label, "{text}");
    }
}

#[test]
fn who_waits_in_a_queue_is_still_there() {
    let config = gateway(&["127.0.0.1:0"]);
    let old = Sockets::take(&config).unwrap();
    let spares = old.spares().unwrap();
    let bound = old.into_bound();
    bound[0].listen().unwrap();
    let address = bound[0].socket.local_addr().unwrap().as_socket().unwrap();
    let client = TcpStream::connect(address).unwrap();
    let new = Sockets::take_among(&config, &mut hand_over(&spares)).unwrap().into_bound();
    drop((bound, spares));
    let (_, peer) = new[0].socket.accept().unwrap();
    assert_eq!(peer.as_socket(), client.local_addr().ok());
    assert_eq!(new[0].place, Place::Tcp("127.0.0.1:0".parse().unwrap()));
}

#[test]
fn a_file_is_removed_by_whose_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let config = gateway(&[&format!("unix:{}", path.display())]);
    let old = Sockets::take(&config).unwrap();
    let spares = old.spares().unwrap();

    // One that did not get so far.
    let failed = Sockets::take_among(&config, &mut hand_over(&spares)).unwrap();
    drop(failed);
    assert!(path.exists(), "it is still the old one's");

    let new = Sockets::take_among(&config, &mut hand_over(&spares)).unwrap();
    let new_spares = new.spares().unwrap();
    spares.iter().for_each(Spare::leave);
    new_spares.iter().for_each(Spare::claim);
    drop((old, spares));
    UnixStream::connect(&path).expect("the file leads to the socket that is left");
    drop((new, new_spares));
    assert!(!path.exists());
}

#[test]
fn one_whose_file_is_another_by_now_is_opened_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let config = gateway(&[&format!("unix:{}", path.display())]);
    let old = Sockets::take(&config).unwrap();
    let mut handed = hand_over(&old.spares().unwrap());
    std::fs::rename(&path, folder.path().join("aside")).unwrap();
    let _new = Sockets::take_among(&config, &mut handed).unwrap();
    UnixStream::connect(&path).unwrap();
    assert_eq!(handed.close().len(), 1);
    assert!(path.exists());
}

#[test]
fn what_nobody_wants_any_more_is_closed_and_its_file_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let old = Sockets::take(&gateway(&[&format!("unix:{}", path.display()), "127.0.0.1:0"])).unwrap();
    let spares = old.spares().unwrap();
    let old = old.into_bound();
    for bound in &old {
        bound.listen().unwrap();
    }
    let mut handed = hand_over(&spares);
    Sockets::take_among(&gateway(&["127.0.0.1:0"]), &mut handed).unwrap();
    assert_eq!(handed.close(), [format!("unix:{}", path.display())]);
    assert!(!path.exists());
}
