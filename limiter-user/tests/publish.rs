//! `limiter publish` and `limiter kick USER` against a gateway that runs, as a user types them. No kernel's part is there.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _};
use limiter::{
    admin::{Admin, Control, Metrics, Readiness},
    config::{self, Auth, Places, UserLimits, new_api_key},
    gateway::Gateway,
    policy::{Fixed, Limits},
};
use tempfile::TempDir;
use tokio::{net::TcpStream, runtime::Runtime, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A gateway with rooms, whose users show API keys, and its admin address.
struct Running {
    runtime: Runtime,
    folder: TempDir,
    gateway: SocketAddr,
    admin: SocketAddr,
    key: String,
}

impl Running {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (key, entry) = new_api_key("alice", Some(0), Some(0), None).unwrap();
        let (keys, secret) = (folder.path().join("keys.toml"), folder.path().join("secret"));
        fs::write(&keys, entry).unwrap();
        fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
        let auth = Auth {
            places: Places { authorization: true, ..Places::default() },
            api_keys: Some(keys),
            users: UserLimits { connections: 0, ..UserLimits::default() },
            ..Auth::default()
        };
        let config = config::Gateway {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            upstream: config::Upstream::Broadcast,
            auth: Some(auth),
            ..config::Gateway::default()
        };
        let context = runtime.enter();
        let policy = Arc::new(Fixed::new(Limits::default(), &[]));
        let gateway = Gateway::bind(&config, policy, Arc::default()).unwrap();
        let mut control = Control::new(&secret).unwrap();
        control.lead_to(gateway.push());
        let address = gateway.local_addrs()[0];
        runtime.spawn(gateway.run(std::future::pending()));
        let admin = runtime.block_on(Admin::bind("127.0.0.1:0".parse().unwrap())).unwrap();
        let admin = admin.showing(Metrics::default(), Readiness::default(), Arc::default(), Some(control));
        let admin_address = admin.local_addr();
        runtime.spawn(admin.run(std::future::pending()));
        drop(context);
        let running = Self { runtime, folder, gateway: address, admin: admin_address, key };
        running.configure("limiter.toml", admin_address, &secret);
        running
    }

    fn configure(&self, name: &str, admin: SocketAddr, secret: &Path) -> PathBuf {
        let path = self.folder.path().join(name);
        let text = format!("[admin]\nlisten = \"{admin}\"\ntoken_file = \"{}\"\n", secret.display());
        fs::write(&path, text).unwrap();
        path
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("limiter.toml")
    }

    fn join(&self, path: &str) -> WebSocketStream<MaybeTlsStream<TcpStream>> {
        let mut request = format!("ws://{}{path}", self.gateway).into_client_request().unwrap();
        request.headers_mut().insert("authorization", format!("Bearer {}", self.key).parse().unwrap());
        self.runtime.block_on(tokio_tungstenite::connect_async(request)).unwrap().0
    }

    fn next(&self, client: &mut WebSocketStream<MaybeTlsStream<TcpStream>>) -> Message {
        let next = async { timeout(PATIENCE, client.next()).await.expect("a message").unwrap().unwrap() };
        self.runtime.block_on(next)
    }
}

/// Status, stdout and stderr.
fn limiter(config: Option<&Path>, arguments: &[&str], input: &[u8]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limiter"));
    command.env_clear().args(arguments).args(["--pin-path", "/sys/fs/bpf/limiter-is-not-here"]);
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    // It need not read what it is given.
    _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn done(stdout: &str) -> (Option<i32>, String, String) {
    (Some(0), stdout.to_owned(), String::new())
}

#[test]
fn a_message_reaches_whom_it_is_for() {
    let running = Running::start();
    let config = running.config();
    let mut client = running.join("/a");
    let publish = |arguments: &[&str], input: &[u8]| limiter(Some(&config), &[&["publish"], arguments].concat(), input);
    assert_eq!(publish(&["--room", "/a", "one"], b""), done("sent to 1 client\n"));
    assert_eq!(publish(&["--room", "/b", "nothing"], b""), done("nobody is there\n"));
    assert_eq!(publish(&["--user", "alice", "-"], b"two\n"), done("sent to 1 client\n"));
    assert_eq!(publish(&["--all", "--json", "three"], b""), done("{\n  \"receivers\": 1\n}\n"));
    assert_eq!(publish(&["--all", "--binary", "-"], &[0, 255]), done("sent to 1 client\n"));
    for expected in
        [Message::text("one"), Message::text("two\n"), Message::text("three"), Message::binary(vec![0, 255])]
    {
        assert_eq!(running.next(&mut client), expected);
    }
    let admin = running.admin.to_string();
    let elsewhere =
        running.configure("elsewhere.toml", "127.0.0.1:1".parse().unwrap(), &running.folder.path().join("secret"));
    let arguments = ["publish", "--admin", &admin, "--all", "four"];
    assert_eq!(limiter(Some(&elsewhere), &arguments, b""), done("sent to 1 client\n"));
}

#[test]
fn a_user_is_kicked_where_there_is_no_kernels_part() {
    let running = Running::start();
    let mut client = running.join("/a");
    let config = running.config();
    assert_eq!(limiter(Some(&config), &["kick", "bob"], b""), done("nothing is open from user bob\n"));
    assert_eq!(limiter(Some(&config), &["kick", "alice"], b""), done("closed 1 connection from user alice\n"));
    let Message::Close(Some(frame)) = running.next(&mut client) else { panic!("it is closed") };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (4403, "disconnected"));
    // The answer to it.
    _ = running.runtime.block_on(client.flush());
    assert_eq!(limiter(Some(&config), &["kick", "--json", "alice"], b"").0, Some(0));
}

/// The configuration, what is typed and what comes in; the status, and a part of the message.
type Case<'a> = (Option<&'a Path>, &'a [&'a str], &'a [u8], i32, &'a str);

#[test]
fn what_is_in_the_way_is_said() {
    let running = Running::start();
    let good = running.config();
    let other = running.folder.path().join("other");
    fs::write(&other, "x".repeat(32)).unwrap();
    let short = running.folder.path().join("short");
    fs::write(&short, "short").unwrap();
    let wrong = running.configure("wrong.toml", running.admin, &other);
    let bad = running.configure("bad.toml", running.admin, &short);
    let nowhere = running.configure("nowhere.toml", "127.0.0.1:1".parse().unwrap(), &other);
    let publish = ["publish", "--all", "x"];
    let cases: [Case; 9] = [
        (None, &publish, b"", 2, "admin.token_file"),
        (Some(&wrong), &publish, b"", 4, "that is not the secret of admin.token_file"),
        (Some(&bad), &publish, b"", 1, "fewer than 32 bytes"),
        (Some(&nowhere), &publish, b"", 3, "is `limiter run` running"),
        (Some(&good), &["publish", "--all", "-"], &[0xff], 2, "--binary"),
        (Some(&good), &["publish", "--room", "lobby", "x"], b"", 1, "no room can have that name"),
        (Some(&good), &["publish", "x"], b"", 2, "--room"),
        (None, &["kick", "alice"], b"", 3, "admin.token_file"),
        (Some(&good), &["kick", "192.0.2.7"], b"", 3, "limiter-is-not-here"),
    ];
    for (config, arguments, input, status, complaint) in cases {
        let (code, stdout, stderr) = limiter(config, arguments, input);
        assert_eq!((code, stdout.as_str()), (Some(status), ""), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("limiter: ") && stderr.contains(complaint), "{arguments:?}: {stderr}");
    }
}

/// The binary, until the end of the test.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// A port that nobody had just now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn limiter_run_takes_messages_for_every_service() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, "0123456789abcdef0123456789abcdef").unwrap();
    let [rooms, echo, admin] = [free_port(), free_port(), free_port()];
    let config = folder.path().join("limiter.toml");
    let text = format!(
        "[gateway]\nlisten = [\"127.0.0.1:{rooms}\", \"127.0.0.1:{echo}\"]\nupstream = \"broadcast\"\n\
         [[gateway.route]]\npath = \"/echo\"\nupstream = \"echo\"\n\
         [[service]]\nname = \"one\"\nport = {rooms}\n[[service]]\nname = \"two\"\nport = {echo}\n\
         [admin]\nlisten = \"127.0.0.1:{admin}\"\ntoken_file = \"{}\"\n",
        secret.display()
    );
    fs::write(&config, text).unwrap();
    let checked = limiter(None, &["config", "check", config.to_str().unwrap()], b"");
    assert_eq!(checked.0, Some(0), "{}", checked.2);
    let mut command = Command::new(env!("CARGO_BIN_EXE_limiter"));
    command.env_clear().args(["run", "--config", config.to_str().unwrap()]);
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _daemon = Daemon(quiet.spawn().unwrap());

    let runtime = Runtime::new().unwrap();
    let join = async |port: u16, path: &str| loop {
        match tokio_tungstenite::connect_async(format!("ws://127.0.0.1:{port}{path}")).await {
            Ok((client, _)) => return client,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let mut clients = runtime.block_on(async {
        let all = async { [join(rooms, "/a").await, join(rooms, "/echo").await, join(echo, "/a").await] };
        timeout(PATIENCE, all).await.expect("it starts")
    });
    assert_eq!(limiter(Some(&config), &["publish", "--room", "/a", "x"], b""), done("sent to 2 clients\n"));
    assert_eq!(limiter(Some(&config), &["publish", "--all", "y"], b""), done("sent to 3 clients\n"));
    for (client, expected) in clients.iter_mut().zip([&["x", "y"][..], &["y"], &["x", "y"]]) {
        for text in expected {
            let next = async { timeout(PATIENCE, client.next()).await.expect("a message").unwrap().unwrap() };
            assert_eq!(runtime.block_on(next), Message::text(*text));
        }
    }
}
