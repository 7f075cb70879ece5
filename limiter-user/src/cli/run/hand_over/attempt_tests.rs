use std::{net::TcpListener, os::fd::AsFd};

use super::*;
use crate::gateway::Label;

fn shell(script: &str) -> Program {
    Program { path: Some("/bin/sh".into()), arguments: ["limiter", "-c", script].map(Into::into).into() }
}

fn start(script: &str, offer: &Offer, longest: Duration) -> Attempt {
    Attempt::start(&shell(script), offer, None, longest).unwrap()
}

const LONG: Duration = Duration::from_secs(30);

/// A process that says this, and goes on.
async fn that_says(word: u8) -> (Attempt, UnixStream) {
    let (channel, mut theirs) = UnixStream::pair().unwrap();
    let mut attempt = start("exec sleep 100", &Offer::default(), LONG);
    attempt.channel = channel;
    theirs.write_u8(word).await.unwrap();
    (attempt, theirs)
}

#[tokio::test]
async fn one_that_is_ready_is_left_to_itself() {
    let (mut attempt, mut theirs) = that_says(READY).await;
    attempt.ready().await.unwrap();
    let id = attempt.id();
    attempt.begin(false).await;
    assert_eq!(theirs.read_u8().await.unwrap(), BEGIN);
    let pid = i32::try_from(id).unwrap();
    // SAFETY: it takes two numbers. Nobody has waited for the child, so the id is still its own.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0, "it lives");
}

#[tokio::test]
async fn why_one_is_never_ready_is_said() {
    let mut ended = start("exit 2", &Offer::default(), LONG);
    assert_eq!(ended.ready().await.unwrap_err().to_string(), "the new process ended (exit status: 2)");
    let mut stuck = start("exec sleep 100", &Offer::default(), Duration::from_millis(100));
    assert!(stuck.ready().await.unwrap_err().to_string().contains("not ready in time"));
    assert!(stuck.child.as_mut().unwrap().try_wait().unwrap().is_some(), "it was killed");
    let (mut strange, _theirs) = that_says(b'x').await;
    assert!(strange.ready().await.unwrap_err().to_string().contains("0x78"));
    let missing = Program { path: Some("/nowhere/limiter".into()), ..shell("") };
    let error = Attempt::start(&missing, &Offer::default(), None, LONG).unwrap_err();
    assert!(format!("{error:#}").contains("can't start /nowhere/limiter: No such file"), "{error:#}");
}

/// Whatever else is open in this process, and how.
#[tokio::test]
async fn what_is_offered_is_handed_over_and_nothing_else() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let label = Label::tcp(listener.local_addr().unwrap());
    let spare = Spare::new(label, listener.as_fd().try_clone_to_owned().unwrap());
    let handed = spare.as_fd().as_raw_fd();
    let offer = Offer { sockets: vec![spare], admin: None };
    // A socket as well, for the shell has files of its own.
    let careless = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    // SAFETY: it takes three numbers.
    assert_eq!(unsafe { libc::fcntl(careless.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("fds");
    let mut attempt = start(&format!("ls -l /proc/$$/fd > {}; exit 1", list.display()), &offer, LONG);
    attempt.ready().await.unwrap_err();
    let list = std::fs::read_to_string(list).unwrap();
    let sockets: Vec<RawFd> =
        list.lines().filter_map(|line| line.split_once(" -> socket:")?.0.rsplit(' ').next()?.parse().ok()).collect();
    assert!(sockets.contains(&handed), "{list}");
    assert!(!sockets.contains(&careless.as_raw_fd()), "{list}");
    assert_eq!(sockets.len(), 2, "the socket and the channel: {list}");
}
