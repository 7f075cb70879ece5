use std::time::Duration;

use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;

fn v2(command: u8, family: u8, addresses: &[u8], tlvs: &[u8]) -> Vec<u8> {
    let length = u16::try_from(addresses.len() + tlvs.len()).unwrap().to_be_bytes();
    [SIGNATURE, &[command, family][..], &length, addresses, tlvs].concat()
}

/// 192.0.2.7:51234 to 198.51.100.1:443.
const V4: [u8; 12] = [192, 0, 2, 7, 198, 51, 100, 1, 0xc8, 0x22, 0x01, 0xbb];

fn expected_v4() -> Header {
    Header::Proxied { source: "192.0.2.7:51234".parse().unwrap(), destination: "198.51.100.1:443".parse().unwrap() }
}

/// The header of what is nothing but a header.
fn whole(bytes: &[u8]) -> Header {
    let (header, length) = parse(bytes).unwrap().expect("a whole header");
    assert_eq!(length, bytes.len());
    header
}

#[test]
fn version_1_is_read() {
    assert_eq!(whole(b"PROXY TCP4 192.0.2.7 198.51.100.1 51234 443\r\n"), expected_v4());
    assert_eq!(
        whole(b"PROXY TCP6 2001:db8::7 2001:db8::1 1 65535\r\n"),
        Header::Proxied {
            source: "[2001:db8::7]:1".parse().unwrap(),
            destination: "[2001:db8::1]:65535".parse().unwrap()
        }
    );
    assert_eq!(whole(b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 51234 443\r\n"), expected_v4());
    assert_eq!(whole(b"PROXY UNKNOWN\r\n"), Header::Local);
    let longest: &[u8] = b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n";
    assert_eq!(longest.len(), LONGEST_V1);
    assert_eq!(whole(longest), Header::Local);
}

#[test]
fn version_2_is_read_and_tlvs_are_skipped() {
    assert_eq!(whole(&v2(0x21, 0x11, &V4, &[])), expected_v4());
    assert_eq!(whole(&v2(0x21, 0x11, &V4, &[0x04, 0, 2, 1, 2])), expected_v4());
    let v6 = [[0x20; 16], [0x30; 16]].concat();
    let header = whole(&v2(0x21, 0x21, &[&v6[..], &[0, 80, 1, 0xbb]].concat(), &[]));
    assert_eq!(
        header,
        Header::Proxied {
            source: SocketAddr::new([0x20; 16].into(), 80),
            destination: SocketAddr::new([0x30; 16].into(), 443)
        }
    );
    let full = vec![0; LONGEST_V2 - V2_PREFIX - V4.len()];
    assert_eq!(whole(&v2(0x21, 0x11, &V4, &full)), expected_v4());
}

#[test]
fn what_a_proxy_opens_for_itself_is_local() {
    for header in [
        v2(0x20, 0x00, &[], &[]),
        v2(0x20, 0x11, &V4, &[]),
        v2(0x20, 0xff, &[1, 2, 3], &[]),
        v2(0x21, 0x00, &[], &[1, 2, 3]),
        v2(0x21, 0x31, &[0; 216], &[]),
    ] {
        assert_eq!(whole(&header), Header::Local, "{header:?}");
    }
}

#[test]
fn what_is_no_header_is_refused_without_waiting_for_more() {
    for bytes in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"G",
        b"\x16\x03\x01",
        b"PROXy",
        b"\r\n\r\nQ",
        b"PROXY \r\n",
        b"PROXY TCP5 1.1.1.1 2.2.2.2 1 2\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 1 65536\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 +1 2\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n",
        b"PROXY TCP4 1.1.1.1  2.2.2.2 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 1 \xff\r\n",
        &[&b"PROXY UNKNOWN "[..], &[b'x'; 100]].concat(),
        &v2(0x11, 0x11, &V4, &[]),
        &v2(0x22, 0x11, &V4, &[]),
        &v2(0x21, 0x41, &V4, &[]),
        &v2(0x21, 0x11, &V4[..11], &[]),
        &v2(0x21, 0x21, &V4, &[]),
        // The length alone is enough.
        &v2(0x21, 0x11, &V4, &vec![0; LONGEST_V2])[..V2_PREFIX],
    ] {
        assert!(matches!(parse(bytes), Err(HeaderError::Invalid(_))), "{bytes:?}");
    }
}

/// What a server reads that is sent `chunks` one after the other: the header, and the rest to the end.
async fn served(chunks: Vec<Vec<u8>>) -> (Result<Header, HeaderError>, Vec<u8>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let mut server = Wire::Tcp(server);
    client.set_nodelay(true).unwrap();
    let sending = async move {
        for chunk in chunks {
            client.write_all(&chunk).await.unwrap();
            tokio::task::yield_now().await;
        }
        client.shutdown().await.unwrap();
        client
    };
    let reading = async {
        let header = read(&server).await;
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        (header, rest)
    };
    let (_client, read) =
        tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(sending, reading) }).await.expect("an end");
    read
}

#[tokio::test]
async fn not_a_byte_more_than_the_header_is_taken() {
    let headers = [
        b"PROXY TCP4 192.0.2.7 198.51.100.1 51234 443\r\n".to_vec(),
        v2(0x21, 0x11, &V4, &[]),
        v2(0x21, 0x11, &V4, &[7; 2000]),
    ];
    for header in headers {
        let all = [&header[..], b"\r\nGET / HTTP/1.1"].concat();
        let bytewise = all.iter().map(|byte| vec![*byte]).collect();
        for chunks in [vec![all.clone()], bytewise, all.chunks(13).map(<[u8]>::to_vec).collect()] {
            let (read, rest) = served(chunks).await;
            assert_eq!(read.unwrap(), expected_v4());
            assert_eq!(rest, b"\r\nGET / HTTP/1.1");
        }
    }
}

#[tokio::test]
async fn a_header_that_ends_early_is_an_end() {
    for bytes in [&b""[..], b"PROX", b"PROXY TCP4 192.0.2.7", &v2(0x21, 0x11, &V4, &[])[..20]] {
        let (read, _) = served(vec![bytes.to_vec()]).await;
        assert!(matches!(read, Err(HeaderError::Ended)), "{bytes:?} gave {read:?}");
    }
}

/// Bytes that get past the first look now and then.
fn nearly() -> impl Strategy<Value = Vec<u8>> {
    let magic = prop_oneof![
        Just(SIGNATURE.to_vec()),
        Just(V1.to_vec()),
        Just(b"PROXY TCP4 ".to_vec()),
        Just([&SIGNATURE[..], &[0x21, 0x11, 0]].concat()),
        Just(Vec::new()),
    ];
    (magic, proptest::collection::vec(any::<u8>(), 0..300)).prop_map(|(magic, rest)| [magic, rest].concat())
}

proptest! {
    #[test]
    fn nothing_makes_it_panic_nor_take_more_than_there_is(bytes in nearly()) {
        if let Ok(Some((_, length))) = parse(&bytes) {
            prop_assert!(length <= bytes.len() && length <= LONGEST_V2);
        }
    }

    /// What is not refused at once is not refused for having come in parts, and never accepted too early.
    #[test]
    fn a_beginning_waits_for_the_rest(bytes in nearly(), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(bytes.len() + 1);
        if cut > 0 && let Ok(Some((header, length))) = parse(&bytes) {
            match parse(&bytes[..cut]) {
                Ok(None) => prop_assert!(cut < length),
                Ok(Some(early)) => prop_assert_eq!(early, (header, length)),
                Err(e) => prop_assert!(false, "{}", e),
            }
        }
    }

    #[test]
    fn what_a_proxy_writes_is_read(
        source in any::<std::net::SocketAddrV4>(),
        destination in any::<std::net::SocketAddrV4>(),
        tlvs in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let expected = Header::Proxied { source: source.into(), destination: destination.into() };
        let (from, to) = (source, destination);
        let text = format!("PROXY TCP4 {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port());
        prop_assert_eq!(whole(text.as_bytes()), expected);
        let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        let addresses = [&from.ip().octets()[..], &to.ip().octets(), &ports].concat();
        prop_assert_eq!(whole(&v2(0x21, 0x11, &addresses, &tlvs)), expected);
    }
}
