//! Child processes: never left behind, never waited for without end.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};

use crate::wait::eventually;

/// A child process whose output is collected. It is killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: Lines,
    stderr: Lines,
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All that it wrote.
    pub stdout: String,
    /// All that it wrote.
    pub stderr: String,
}

impl Process {
    /// Starts `command`. What it writes to stderr appears in the test's output as well.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().rsplit('/').next().unwrap_or_default().to_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let stdout = Lines::collect(child.stdout.take().context("stdout is piped")?, None);
        let echo = format!("{name}[{}]", child.id());
        let stderr = Lines::collect(child.stderr.take().context("stderr is piped")?, Some(echo));
        Ok(Self { child, name, stdout, stderr })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        self.stdout.so_far()
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        // SAFETY: kill takes two integers; the process is our child and not yet reaped, so the id is still its own.
        let outcome = unsafe { libc::kill(pid, signal) };
        anyhow::ensure!(outcome == 0, "cannot signal {}: {}", self.name, std::io::Error::last_os_error());
        Ok(())
    }

    /// Waits for the end, at most for `limit`; a process that outlasts it is killed, and that is an error.
    pub fn wait(mut self, limit: Duration) -> Result<Ended> {
        let what = format!("{} ended", self.name);
        eventually(limit, &what, || Ok(!self.is_running()?))?;
        let status = self.child.wait()?;
        Ok(Ended { status, stdout: self.stdout.join()?, stderr: self.stderr.join()? })
    }

    /// Waits for the end of the process itself, at most for `limit`: others that it has started may go on, and write where it wrote.
    pub fn wait_status(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} ended", self.name);
        eventually(limit, &what, || Ok(!self.is_running()?))?;
        Ok(self.child.wait()?)
    }

    /// Ends it by SIGKILL, which it can't notice.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it was reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
struct Lines {
    text: Arc<Mutex<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Lines {
    /// Reads to the end; each line is also printed, if it is to be, behind the process's name.
    fn collect(stream: impl Read + Send + 'static, echo: Option<String>) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&text);
        let thread = thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                if let Some(name) = &echo {
                    eprintln!("{name}: {line}");
                }
                let mut text = collected.lock().unwrap_or_else(PoisonError::into_inner);
                text.push_str(&line);
                text.push('\n');
            }
        });
        Self { text, thread: Some(thread) }
    }

    fn so_far(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn join(&mut self) -> Result<String> {
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the reader of a process's output panicked"))?;
        }
        Ok(self.so_far())
    }
}
