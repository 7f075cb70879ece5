//! The secret of the admin address.

use std::{
    fmt, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use ring::digest;
use subtle::ConstantTimeEq as _;

use super::bounded;

/// Shortest secret: with that many random bytes there is nothing to guess.
const SHORTEST_BYTES: usize = 32;

/// Longest secret, so that it fits into the head of a request.
const LONGEST_BYTES: usize = 4096;

/// What whoever publishes messages and disconnects users has to show. The secret itself is not kept.
#[derive(Clone)]
pub struct AdminToken {
    digest: [u8; 32],
    /// Whether others than the owner of the file may read it.
    pub is_readable_by_others: bool,
}

/// Why the file is of no use. Never says what is in it.
#[derive(Debug, thiserror::Error)]
pub enum AdminTokenError {
    /// It can't be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// What is in it is no good secret.
    #[error("{}: {problem}; `openssl rand -hex 32` makes a good one", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl AdminToken {
    /// Reads a file; white space around the secret is none of it.
    ///
    /// # Errors
    /// [`AdminTokenError`] says why it can't be used.
    pub fn load(path: &Path) -> Result<Self, AdminTokenError> {
        let secret = Self::secret(path)?;
        let mode = fs::metadata(path).map_or(0, |file| file.permissions().mode());
        Ok(Self { digest: sha256(secret.as_bytes()), is_readable_by_others: mode & 0o007 != 0 })
    }

    /// The secret in a file, to show it.
    ///
    /// # Errors
    /// [`AdminTokenError`] says why it can't be used.
    pub fn secret(path: &Path) -> Result<String, AdminTokenError> {
        let unreadable = |error| AdminTokenError::Unreadable { path: path.to_owned(), error };
        let invalid = |problem| AdminTokenError::Invalid { path: path.to_owned(), problem };
        let bytes = bounded::read(path, LONGEST_BYTES as u64 + 2).map_err(unreadable)?;
        let secret = bytes.trim_ascii();
        if secret.len() < SHORTEST_BYTES {
            return Err(invalid("the secret has fewer than 32 bytes"));
        }
        if !secret.iter().all(u8::is_ascii_graphic) {
            return Err(invalid("the secret is not one line of printable ASCII characters without spaces"));
        }
        // All ASCII.
        Ok(String::from_utf8_lossy(secret).into_owned())
    }

    /// Whether it is what somebody shows, in a time that does not depend on how much of it is right.
    pub fn is(&self, shown: &[u8]) -> bool {
        sha256(shown).ct_eq(&self.digest).into()
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminToken").finish_non_exhaustive()
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(content: &[u8]) -> Result<AdminToken, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, content).unwrap();
        AdminToken::load(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_secret_is_known_without_what_stands_around_it() {
        let token = load(b" 0123456789abcdef0123456789abcdef\r\n").unwrap();
        assert!(token.is(b"0123456789abcdef0123456789abcdef"));
        assert!(!token.is(b"0123456789abcdef0123456789abcdee") && !token.is(b""));
        assert!(!token.is_readable_by_others);
        assert!(!format!("{token:?}").contains("0123"));
    }

    #[test]
    fn what_is_no_good_secret_is_refused_and_not_repeated() {
        for (content, complaint) in [
            (&b""[..], "fewer than 32 bytes"),
            (b"0123456789abcdef0123456789abcde\n\n\n", "fewer than 32 bytes"),
            (b"0123456789abcdef 0123456789abcdef", "without spaces"),
            (b"0123456789abcdef\n0123456789abcdef", "without spaces"),
            (&[0xff; 40], "without spaces"),
            (&[b'x'; 5000], "longer than"),
        ] {
            let error = load(content).unwrap_err();
            assert!(error.contains(complaint) && !error.contains("abcd"), "{error}");
        }
        assert!(AdminToken::load(Path::new("/nowhere")).unwrap_err().to_string().contains("cannot read /nowhere"));
    }
}
