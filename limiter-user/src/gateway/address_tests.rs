use std::os::unix::net::{UnixListener, UnixStream};

use super::*;

fn gateway(listen: Vec<Listen>) -> config::Gateway {
    config::Gateway { listen, ..config::Gateway::default() }
}

fn refusal(listen: Vec<Listen>) -> String {
    Sockets::take(&gateway(listen)).unwrap_err().to_string()
}

#[test]
fn a_unix_socket_has_its_mode_and_goes_when_it_is_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    for mode in [0o600, 0o666] {
        let config = config::Gateway { unix_mode: mode, ..gateway(vec![Listen::Unix(path.clone())]) };
        let sockets = Sockets::take(&config).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        UnixStream::connect(&path).expect("whoever connects waits");
        drop(sockets);
        assert!(!path.exists());
    }
}

#[test]
fn the_socket_of_a_dead_process_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind, as by kill -9");
    let _sockets = Sockets::take(&gateway(vec![Listen::Unix(path.clone())])).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn the_socket_of_a_living_process_is_an_error_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let error = refusal(vec![Listen::Unix(path.clone())]);
    assert!(error.contains("in use") && error.contains("ss -lxp"), "{error}");
    UnixStream::connect(&path).expect("it still listens");
    drop(listener);
}

#[test]
fn what_is_no_socket_is_never_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes.txt");
    fs::write(&path, "mine").unwrap();
    let error = refusal(vec![Listen::Unix(path.clone())]);
    assert!(error.contains("no socket"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    let error = refusal(vec![Listen::Unix(folder.path().join("missing/ws.sock"))]);
    assert!(error.contains("RuntimeDirectory="), "{error}");
}

#[test]
fn a_socket_that_another_has_put_there_meanwhile_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let sockets = Sockets::take(&gateway(vec![Listen::Unix(path.clone())])).unwrap();
    // Beside it first: the inode of a file that is gone may be given out again.
    let newer = folder.path().join("newer.sock");
    let _listener = UnixListener::bind(&newer).unwrap();
    fs::rename(&newer, &path).unwrap();
    drop(sockets);
    assert!(path.exists());
}

#[test]
fn an_address_can_be_shared_if_both_want_to() {
    let first = config::Gateway { reuse_port: true, ..gateway(vec!["127.0.0.1:0".parse().unwrap()]) };
    let sockets = Sockets::take(&first).unwrap();
    sockets.0[0].listen().unwrap();
    let address = sockets.0[0].socket.local_addr().unwrap().as_socket().unwrap();
    let second = config::Gateway { listen: vec![address.into()], ..first };
    Sockets::take(&second).unwrap().0[0].listen().unwrap();
    let alone = config::Gateway { reuse_port: false, ..second };
    Sockets::take(&alone).unwrap_err();
}

#[test]
fn what_nobody_handed_over_is_an_error() {
    for listen in [Listen::Systemd, Listen::Named("ws".into())] {
        let error = refusal(vec![listen.clone()]);
        assert!(error.contains(&listen.to_string()) && error.contains(".socket"), "{error}");
    }
}

#[test]
fn only_a_listening_socket_is_adopted() {
    let file = tempfile::tempfile().unwrap();
    assert!(adopt("log", file.into()).unwrap_err().to_string().contains("no socket"));
    let idle = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    assert!(adopt("idle", idle.into()).unwrap_err().to_string().contains("does not listen"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    assert_eq!(adopt("ws", listener.into()).unwrap().place, Place::Tcp(address));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let bound = adopt("ws", listener.into()).unwrap();
    assert_eq!(bound.place, Place::Unix(path.clone()));
    drop(bound);
    assert!(path.exists(), "it is for whoever made it to remove");
}

#[test]
fn sockets_are_shared_out_by_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let listen = vec!["127.0.0.1:0".parse().unwrap(), Listen::Unix(path.clone())];
    let mut sockets = Sockets::take(&gateway(listen)).unwrap();
    let unix = sockets.split_off(|place| place.tcp().is_none());
    assert_eq!(unix.places().collect::<Vec<_>>(), [&Place::Unix(path)]);
    assert_eq!(sockets.places().count(), 1);
}

#[test]
fn what_is_accepted_has_the_options_of_the_listening_socket() {
    let sockets = Sockets::take(&gateway(vec!["127.0.0.1:0".parse().unwrap()])).unwrap();
    let listener = &sockets.0[0];
    listener.listen().unwrap();
    let address = listener.socket.local_addr().unwrap().as_socket().unwrap();
    let _client = std::net::TcpStream::connect(address).unwrap();
    let (accepted, _) = listener.socket.accept().unwrap();
    assert!(accepted.tcp_nodelay().unwrap());
    assert_eq!(accepted.tcp_notsent_lowat().unwrap(), NOT_SENT_LOW_WATER);
}
