//! Clients that must show who they are.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio_tungstenite::tungstenite::{Error, Message, client::IntoClientRequest};

use super::{relays, support::*};
use crate::{
    config::{self, Auth, Jwt, OnExcess, Places, UserLimits, new_api_key},
    gateway::{
        Content, Recipients,
        auth::signing::{Signer, now},
    },
    policy::Limits,
};

/// A gateway that takes the tokens of one key, wherever they are shown.
pub struct Setup {
    pub folder: TempDir,
    pub signer: Signer,
    pub auth: Auth,
}

impl Setup {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let signer = Signer::es256();
        let public_keys = vec![signer.write(folder.path(), "key.pem")];
        let places = Places {
            authorization: true,
            cookie: Some("session".into()),
            query: Some("token".into()),
            subprotocol: Some("bearer".into()),
        };
        let jwt = Jwt { public_keys, leeway: Duration::ZERO, ..Jwt::default() };
        Self { folder, signer, auth: Auth { places, jwt: Some(jwt), ..Auth::default() } }
    }

    pub fn config(&self) -> config::Gateway {
        config::Gateway { auth: Some(self.auth.clone()), ..quiet() }
    }
}

/// A connect, or the answer that it is refused with.
async fn connect(
    gateway: &Running,
    path: &str,
    headers: &[(&'static str, String)],
) -> Result<Client, Box<hyper::Response<Option<Vec<u8>>>>> {
    let mut request = format!("ws://{}{path}", gateway.addr).into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    match tokio_tungstenite::connect_async(request).await {
        Ok((client, _)) => Ok(client),
        Err(Error::Http(response)) => Err(response),
        Err(e) => panic!("neither admitted nor refused: {e}"),
    }
}

fn bearer(token: &str) -> [(&'static str, String); 1] {
    [("authorization", format!("Bearer {token}"))]
}

#[tokio::test]
async fn without_a_good_token_a_client_gets_401_before_the_upgrade() {
    let setup = Setup::new();
    let gateway = start(&setup.config());
    let other = Signer::es256();
    let expired = setup.signer.token(&json!({"sub": "alice", "exp": now() - 1}));
    for (headers, result, challenge) in [
        (vec![], "no_token", "Bearer realm=\"limiter\""),
        (bearer("nonsense").into(), "token_malformed", "error=\"invalid_token\""),
        (bearer(&other.token_of("alice", 60)).into(), "token_signature", "not signed by a key"),
        (bearer(&expired).into(), "token_expired", "has expired"),
    ] {
        let refused = connect(&gateway, "/", &headers).await.unwrap_err();
        assert_eq!(refused.status(), 401);
        assert_eq!(refused.headers()["content-type"], "application/problem+json");
        let shown = refused.headers()["www-authenticate"].to_str().unwrap();
        assert!(shown.starts_with("Bearer realm=") && shown.contains(challenge), "{shown}");
        let body = String::from_utf8(refused.into_body().unwrap()).unwrap();
        assert!(body.contains("\"status\":401"), "{body}");
        assert_eq!(gateway.metric(&format!("limiter_handshakes_total{{result=\"{result}\"}}")), 1, "{result}");
    }
    gateway.wait_released().await;
}

#[tokio::test]
async fn a_good_token_is_taken_from_every_place() {
    let setup = Setup::new();
    let gateway = start(&setup.config());
    let token = setup.signer.token_of("alice", 60);
    for (path, headers) in [
        ("/".to_owned(), bearer(&token).into()),
        (format!("/?x=1&token={token}"), vec![]),
        ("/".to_owned(), vec![("cookie", format!("a=b; session={token}"))]),
        ("/".to_owned(), vec![("sec-websocket-protocol", format!("bearer, {token}"))]),
    ] {
        let mut client = connect(&gateway, &path, &headers).await.unwrap();
        echoes(&mut client, "in").await;
    }
}

#[tokio::test]
async fn the_upstream_is_told_the_user_and_not_the_token() {
    for pass_on in [false, true] {
        let mut setup = Setup::new();
        setup.auth.pass_on = pass_on;
        let (gateway, request) =
            relays::relay_with(setup.config(), "", |mut server| async move { while server.next().await.is_some() {} })
                .await;
        let token = setup.signer.token_of("\u{e4}lice", 60);
        let headers = [
            ("authorization", format!("Bearer {token}")),
            ("cookie", format!("session={token}; a=b")),
            ("x-limiter-user", "root".to_owned()),
        ];
        let _client = connect(&gateway, &format!("/chat?token={token}&room=1"), &headers).await.unwrap();
        let request = request.await.unwrap();
        assert_eq!(request.headers()["x-limiter-user"].as_bytes(), "\u{e4}lice".as_bytes());
        assert_eq!(format!("{request:?}").contains(&token), pass_on);
        if !pass_on {
            assert_eq!(request.uri().path_and_query().unwrap(), "/chat?room=1");
            assert_eq!(request.headers()["cookie"], "a=b");
        }
    }
}

#[tokio::test]
async fn a_session_is_closed_with_4401_when_its_token_expires() {
    let setup = Setup::new();
    let gateway = start(&setup.config());
    let until = now() + 2;
    let token = setup.signer.token(&json!({"sub": "alice", "exp": until}));
    let mut client = connect(&gateway, "/", &bearer(&token)).await.unwrap();
    echoes(&mut client, "in").await;
    assert_eq!(next_close(&mut client).await, (4401, "token expired".into()));
    assert!(now() >= until);
    gateway.wait_released().await;
    assert_eq!(gateway.metric("limiter_sessions_closed_total{reason=\"expired\"}"), 1);
}

#[tokio::test]
async fn a_session_whose_key_is_gone_is_closed_with_4401_and_others_go_on() {
    let mut setup = Setup::new();
    setup.auth.reauth_interval = Duration::from_secs(1);
    let kept = Signer::eddsa();
    let jwt = setup.auth.jwt.as_mut().unwrap();
    jwt.public_keys.push(kept.write(setup.folder.path(), "kept.pem"));
    let gateway = start(&setup.config());
    let mut gone = connect(&gateway, "/", &bearer(&setup.signer.token_of("alice", 600))).await.unwrap();
    let mut stays = connect(&gateway, "/", &bearer(&kept.token_of("bob", 600))).await.unwrap();
    echoes(&mut gone, "in").await;

    let renewed = Signer::es256();
    renewed.write(setup.folder.path(), "key.pem");
    assert_eq!(next_close(&mut gone).await, (4401, "not authenticated any more".into()));
    assert_eq!(gateway.metric("limiter_key_reloads_total{result=\"ok\"}"), 1);
    echoes(&mut stays, "in").await;
    assert_eq!(connect(&gateway, "/", &bearer(&setup.signer.token_of("a", 60))).await.unwrap_err().status(), 401);
    let _new = connect(&gateway, "/", &bearer(&renewed.token_of("alice", 60))).await.unwrap();
}

pub fn users(connections: u32, on_excess: OnExcess, attempts_per_minute: u32) -> UserLimits {
    UserLimits { connections, on_excess, attempts_per_minute }
}

#[tokio::test]
async fn a_newer_login_replaces_the_older_which_is_closed_with_4409() {
    let mut setup = Setup::new();
    setup.auth.users = users(2, OnExcess::Replace, 0);
    let gateway = start(&setup.config());
    let alice = bearer(&setup.signer.token_of("alice", 60));
    let mut other = connect(&gateway, "/", &bearer(&setup.signer.token_of("bob", 60))).await.unwrap();
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(connect(&gateway, "/", &alice).await.unwrap());
    }
    assert_eq!(next_close(&mut clients[0]).await, (4409, "replaced by a newer login".into()));
    for client in &mut clients[1..] {
        echoes(client, "still here").await;
    }
    echoes(&mut other, "still here").await;
    eventually("it is counted", || gateway.metric("limiter_sessions_closed_total{reason=\"replaced\"}") == 1).await;
    assert_eq!(gateway.metric("limiter_users"), 2);
    drop((clients, other));
    gateway.wait_released().await;
    eventually("nobody is left", || gateway.metric("limiter_users") == 0).await;
}

#[tokio::test]
async fn a_newer_login_is_refused_with_429_where_so_configured() {
    let mut setup = Setup::new();
    setup.auth.users = users(1, OnExcess::Refuse, 0);
    let gateway = start(&setup.config());
    let alice = bearer(&setup.signer.token_of("alice", 60));
    let mut first = connect(&gateway, "/", &alice).await.unwrap();
    let refused = connect(&gateway, "/", &alice).await.unwrap_err();
    assert_eq!(refused.status(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"user_full\"}"), 1);
    echoes(&mut first, "still here").await;
    first.close(None).await.unwrap();
    gateway.wait_released().await;
    let _second = connect(&gateway, "/", &alice).await.unwrap();
}

#[tokio::test]
async fn attempts_are_counted_per_user_and_wrong_tokens_are_nobodys() {
    let mut setup = Setup::new();
    setup.auth.users = users(0, OnExcess::Refuse, 2);
    let gateway = start(&setup.config());
    let alice = bearer(&setup.signer.token_of("alice", 60));
    let forged = bearer(&Signer::es256().token_of("alice", 60));
    for _ in 0..3 {
        assert_eq!(connect(&gateway, "/", &forged).await.unwrap_err().status(), 401);
    }
    for _ in 0..2 {
        drop(connect(&gateway, "/", &alice).await.unwrap());
    }
    let refused = connect(&gateway, "/", &alice).await.unwrap_err();
    assert_eq!(refused.status(), 429);
    let retry: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&retry), "{retry}");
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"user_attempts\"}"), 1);
    let _other = connect(&gateway, "/", &bearer(&setup.signer.token_of("bob", 60))).await.unwrap();
}

#[tokio::test]
async fn users_behind_one_address_leave_each_other_room() {
    let mut setup = Setup::new();
    setup.auth.users = users(1, OnExcess::Refuse, 0);
    let gateway =
        start_with(&setup.config(), Limits { connections_per_source: 1, connections_total: 3, ..unlimited() });
    let mut clients = Vec::new();
    for name in ["a", "b", "c"] {
        clients.push(connect(&gateway, "/", &bearer(&setup.signer.token_of(name, 60))).await.unwrap());
    }
    let refused = connect(&gateway, "/", &bearer(&setup.signer.token_of("d", 60))).await.unwrap_err();
    assert_eq!(refused.status(), 503, "they count in all");
    let told = gateway.policy.users.lock().unwrap();
    assert_eq!(told.iter().map(|(_, user)| user.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(told.iter().zip(&clients).all(|((connection, _), client)| connection.remote == address(client)));
}

#[tokio::test]
async fn an_api_key_has_its_own_limit_and_is_closed_when_it_goes() {
    let mut setup = Setup::new();
    setup.auth.users = users(1, OnExcess::Refuse, 0);
    setup.auth.reauth_interval = Duration::from_secs(1);
    let (key, entry) = new_api_key("robot", Some(2), None, None).unwrap();
    let (other, other_entry) = new_api_key("robot", None, None, None).unwrap();
    let path = setup.folder.path().join("keys.toml");
    let write = |text: &str| {
        let new = setup.folder.path().join("keys.new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &path).unwrap();
    };
    write(&format!("{entry}\n{other_entry}"));
    setup.auth.api_keys = Some(path.clone());
    let gateway = start(&setup.config());
    let mut first = connect(&gateway, "/", &bearer(&key)).await.unwrap();
    let _second = connect(&gateway, &format!("/?token={key}"), &[]).await.unwrap();
    assert_eq!(connect(&gateway, "/", &bearer(&key)).await.unwrap_err().status(), 429);
    let mut stays = connect(&gateway, "/", &bearer(&other)).await.unwrap();
    assert_eq!(connect(&gateway, "/", &bearer("lk_unknown")).await.unwrap_err().status(), 401);
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"key_unknown\"}"), 1);
    let _by_token = connect(&gateway, "/", &bearer(&setup.signer.token_of("robot", 60))).await.unwrap();

    write(&other_entry);
    assert_eq!(next_close(&mut first).await, (4401, "not authenticated any more".into()));
    echoes(&mut stays, "still here").await;
    assert_eq!(connect(&gateway, "/", &bearer(&key)).await.unwrap_err().status(), 401);
}

/// What a subscriber writes, kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_token_gets_into_the_log_at_any_level() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let mut setup = Setup::new();
    let (key, entry) = new_api_key("robot", None, None, None).unwrap();
    let path = setup.folder.path().join("keys.toml");
    std::fs::write(&path, entry).unwrap();
    setup.auth.api_keys = Some(path);
    let gateway = start(&setup.config());
    let good = setup.signer.token_of("alice", 60);
    let bad = Signer::hs256().token_of("alice", 60);
    let unknown = new_api_key("robot", None, None, None).unwrap().0;
    for token in [&good, &bad, &key, &unknown] {
        for (path, headers) in [
            ("/".to_owned(), bearer(token).into()),
            (format!("/?token={token}"), vec![]),
            (format!("/?token={token}&token={token}"), vec![]),
            ("/".to_owned(), vec![("cookie", format!("session={token}"))]),
            ("/".to_owned(), vec![("sec-websocket-protocol", format!("bearer, {token}"))]),
        ] {
            // By hand, since the client's own library would write its part of the log.
            let mut request = good_request(&path);
            for (name, value) in headers {
                request = request.replace("\r\n\r\n", &format!("\r\n{name}: {value}\r\n\r\n"));
            }
            let mut request = request.into_bytes();
            request.extend(frame(0x88, &[]));
            assert!(gateway.raw(&request).await.starts_with("HTTP/1.1 "));
        }
    }
    gateway.wait_released().await;
    drop(guard);
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("token_signature") && log.contains("session ends") && log.contains("robot"), "{log}");
    assert!(log.contains("alice") && log.contains("key_unknown"), "{log}");
    for token in [&good, &bad, &key, &unknown] {
        for part in token.trim_start_matches("lk_").split('.') {
            assert!(!log.contains(part), "{part} is in the log: {log}");
        }
    }
}

#[tokio::test]
async fn a_user_is_reached_wherever_it_is_connected_and_closed_on_request() {
    let setup = Setup::new();
    let mut config = setup.config();
    if let Some(auth) = &mut config.auth {
        auth.users.connections = 0;
    }
    let (told, heard) = oneshot::channel();
    let (relay, _) = relays::relay_with(config.clone(), "", |mut server| async move {
        while let Some(Ok(message)) = server.next().await {
            if message.is_close() {
                told.send(message).unwrap();
                break;
            }
        }
    })
    .await;
    let rooms = start(&config::Gateway { upstream: config::Upstream::Broadcast, ..config });
    for gateway in [&relay, &rooms] {
        let push = gateway.settings.0.borrow().hub.push();
        let mut alice = connect(gateway, "/", &bearer(&setup.signer.token_of("alice", 60))).await.unwrap();
        assert_eq!(push.publish(Recipients::User("alice"), Content::Text("for alice")).await, 1);
        assert_eq!(push.publish(Recipients::User("bob"), Content::Text("for bob")).await, 0);
        assert_eq!(push.users("", 9), [("alice".into(), 1)]);
        assert_eq!(push.disconnect("bob", 4000, None).await, 0);
        assert_eq!(push.disconnect("alice", 4000, Some("bye")).await, 1);
        assert_eq!(next(&mut alice).await, Message::text("for alice"));
        assert_eq!(next_close(&mut alice).await, (4000, "bye".to_owned()));
        gateway.policy.wait_closed(1).await;
        assert!(push.users("", 9).is_empty());
    }
    assert_eq!(heard.await.unwrap(), close(1001, "client went away"));
    // Both have metrics of their own.
    let kicked = "limiter_sessions_closed_total{reason=\"kicked\"}";
    assert_eq!((relay.metric(kicked), rooms.metric(kicked)), (1, 1));
}

/// A restart is everybody's, and a client that is told to come back is told when; but not in words that the caller did not choose.
#[tokio::test]
async fn who_is_disconnected_for_now_is_told_when_to_come_back() {
    let mut setup = Setup::new();
    setup.auth.users = users(0, OnExcess::Refuse, 0);
    let gateway = start(&setup.config());
    let push = gateway.settings.0.borrow().hub.push();
    let kicked = async |code, reason| {
        let mut alice = connect(&gateway, "/", &bearer(&setup.signer.token_of("alice", 60))).await.unwrap();
        assert_eq!(push.disconnect("alice", code, reason).await, 1);
        next_close(&mut alice).await
    };
    for code in [1012, 1013] {
        assert_eq!(without_hint(kicked(code, None).await), (code, "disconnected".to_owned()));
        assert_eq!(kicked(code, Some("upgrade")).await, (code, "upgrade".to_owned()));
        assert_eq!(kicked(code, Some("")).await, (code, String::new()));
    }
    for code in [1001, 1008, 4403] {
        assert_eq!(kicked(code, None).await, (code, "disconnected".to_owned()));
    }
}

#[tokio::test]
async fn a_user_has_so_many_messages_over_all_its_connections_and_counts_for_no_source() {
    let mut setup = Setup::new();
    setup.auth.users = users(0, OnExcess::Refuse, 0);
    let (key, entry) = new_api_key("alice", None, None, Some(3)).unwrap();
    let path = setup.folder.path().join("keys.toml");
    std::fs::write(&path, entry).unwrap();
    setup.auth.api_keys = Some(path);
    let messages = config::Messages { rate: 0, rate_per_user: 2, rate_per_source: 1, ..config::Messages::default() };
    let open = config::Route { auth: false, messages: messages.clone(), ..route("/open") };
    let exempt = config::Route { exempt: true, messages: messages.clone(), ..route("/exempt") };
    let gateway = start(&config::Gateway { messages, routes: vec![open, exempt], ..setup.config() });
    let [alice, bob] = ["alice", "bob"].map(|user| bearer(&setup.signer.token_of(user, 60)));
    let closed = (1008, "too many messages over all connections".to_owned());
    for (shown, allowed) in [(&alice, 2), (&bob, 2), (&bearer(&key), 3)] {
        let mut one = connect(&gateway, "/", shown).await.unwrap();
        let mut other = connect(&gateway, "/", shown).await.unwrap();
        for n in 0..allowed {
            echoes(if n % 2 == 0 { &mut one } else { &mut other }, "x").await;
        }
        for client in [&mut one, &mut other] {
            client.send(Message::text("x")).await.unwrap();
            assert_eq!(next_close(client).await, closed);
        }
    }
    // Nothing of that counts for the source, which has one.
    let mut anonymous = connect(&gateway, "/open", &[]).await.unwrap();
    echoes(&mut anonymous, "x").await;
    anonymous.send(Message::text("x")).await.unwrap();
    assert_eq!(next_close(&mut anonymous).await, closed);
    let mut free = connect(&gateway, "/exempt", &bearer(&key)).await.unwrap();
    for _ in 0..5 {
        echoes(&mut free, "x").await;
    }
}
