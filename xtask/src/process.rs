//! Running other programs: each is shown before it runs, and in full when it fails.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Says what is about to happen, on stderr, so that stdout stays with the programs that are run.
pub fn say(what: impl std::fmt::Display) {
    eprintln!("xtask: {what}");
}

/// Runs a command with the terminal as it is.
///
/// # Errors
/// When it can't be started or doesn't succeed; the message is the command line and its status.
pub fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    eprintln!("  $ {line}");
    let status = command.status().with_context(|| format!("can't start: {line}"))?;
    if !status.success() {
        bail!("this command failed ({status}):\n  {line}");
    }
    Ok(())
}

/// Runs a command and returns what it printed, without the newline at the end.
///
/// # Errors
/// When it can't be started or doesn't succeed; the message has what it said on stderr.
pub fn output_of(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("can't start: {line}"))?;
    if !output.status.success() {
        bail!(
            "this command failed ({}):\n  {line}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// A command that needs root: as it is when this is root, else through sudo, which is said.
///
/// # Errors
/// When this is not root and there is no sudo.
pub fn as_root(program: impl AsRef<OsStr>, why: &str) -> Result<Command> {
    as_root_keeping(program, why, [])
}

/// [`as_root`], with variables of the environment that are to get past sudo.
pub fn as_root_keeping(
    program: impl AsRef<OsStr>,
    why: &str,
    variables: impl IntoIterator<Item = String>,
) -> Result<Command> {
    let program = program.as_ref();
    if is_root() {
        return Ok(Command::new(program));
    }
    if find_on_path("sudo").is_none() {
        bail!("{} needs root ({why}), this is not root, and there is no sudo", Path::new(program).display());
    }
    say(format_args!("root is needed {why}: through sudo"));
    let mut command = Command::new("sudo");
    command.args(variables.into_iter().map(|name| format!("--preserve-env={name}"))).arg("--").arg(program);
    Ok(command)
}

/// Whether this process may do what root may.
pub fn is_root() -> bool {
    // The owner of /proc/self is the effective user.
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// Where PATH finds a program.
pub fn find_on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// The command as one would type it: variables that were set for it, program, arguments.
pub fn command_line(command: &Command) -> String {
    let mut line = String::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            // Writing to a String cannot fail.
            let _ = write!(line, "{}={} ", name.to_string_lossy(), quoted(value));
        }
    }
    line.push_str(&quoted(command.get_program()));
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&quoted(arg));
    }
    line
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    if word.chars().any(char::is_control) {
        let escape = |c: char| match c {
            c if c.is_control() => format!("\\x{:02x}", u32::from(c)),
            '\\' | '\'' => format!("\\{c}"),
            c => c.to_string(),
        };
        return format!("$'{}'", word.chars().map(escape).collect::<String>());
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_can_be_pasted_into_a_shell() {
        let mut command = Command::new("/bin/echo");
        command.args(["plain", "two words", "it's", "", "a\x1fb"]).env("KEY", "a b");
        assert_eq!(command_line(&command), r"KEY='a b' /bin/echo plain 'two words' 'it'\''s' '' $'a\x1fb'");
    }

    #[test]
    fn failed_command_is_shown_with_its_status() {
        let error = output_of(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert_eq!(error, "this command failed (exit status: 3):\n  sh -c 'echo why >&2; exit 3'\nwhy");
    }
}
