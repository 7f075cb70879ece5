//! API keys: a file that knows them by their hashes.
//!
//! A key is 32 random bytes, so a plain SHA-256 keeps it as safe as any slow hash would: there is nothing to guess. A slow
//! hash is for passwords, and would let whoever sends wrong keys burn our CPU.

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
};
use serde::Deserialize;
use subtle::ConstantTimeEq as _;

use super::{bounded, user_name};

/// How every key begins, so that people and secret scanners know one when they see it.
pub const API_KEY_PREFIX: &str = "lk_";

const KEY_BYTES: usize = 32;
const DIGEST_BYTES: usize = 32;

/// Longest file that is read: some hundred thousand keys.
const LONGEST_FILE_BYTES: u64 = 1 << 25;

/// The keys of a file.
#[derive(Clone, Debug, Default)]
pub struct ApiKeys {
    /// By the first bytes of their hashes. Who measures how long a look-up takes learns of these bytes at most, which is
    /// nothing: they lead to no key.
    keys: HashMap<[u8; 8], ApiKey>,
}

/// A key as the file has it.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    digest: [u8; DIGEST_BYTES],
    /// The name of whom it is for.
    pub user: Arc<str>,
    /// Connections that may be open with it at a time (0: any number), where it differs from those of other users.
    pub connections: Option<u32>,
    /// Connection attempts per minute with it (0: any number), where that differs from other users'.
    pub attempts_per_minute: Option<u32>,
    /// Messages per `gateway.messages.window` over all connections with it (0: any number), where that differs from
    /// `rate_per_user`.
    pub rate: Option<u32>,
}

/// Why keys can't be used. Never says what is in the file.
#[derive(Debug, thiserror::Error)]
pub enum ApiKeyError {
    /// The file can't be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// The file is not as it should be.
    #[error("{}:{line}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<toml::Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    user: String,
    sha256: String,
    connections: Option<u32>,
    attempts_per_minute: Option<u32>,
    rate: Option<u32>,
}

impl ApiKeys {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ApiKeyError`] says which line is at fault.
    pub fn load(path: &Path) -> Result<Self, ApiKeyError> {
        let unreadable = |error| ApiKeyError::Unreadable { path: path.to_owned(), error };
        let bytes = bounded::read(path, LONGEST_FILE_BYTES).map_err(unreadable)?;
        let text = String::from_utf8(bytes).map_err(|_| unreadable(io::Error::other("it is not a text file")))?;
        Self::parse(&text).map_err(|(offset, problem)| ApiKeyError::Invalid {
            path: path.to_owned(),
            line: super::error::line_and_column(&text, offset).0,
            problem,
        })
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        // Only what it says: it would show the line, too, which may have a key in the place of its hash.
        let file: File = toml::from_str(text)
            .map_err(|error| (error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
        let mut keys = HashMap::with_capacity(file.key.len());
        for entry in file.key {
            let offset = entry.span().start;
            let key = ApiKey::of(entry.get_ref()).map_err(|problem| (offset, problem.to_owned()))?;
            if keys.insert(index(&key.digest), key).is_some() {
                return Err((offset, "this key is in the file already".to_owned()));
            }
        }
        Ok(Self { keys })
    }

    /// The key that `shown` is.
    pub fn find(&self, shown: &str) -> Option<&ApiKey> {
        self.by_digest(&digest_of(shown))
    }

    /// The key with this [`ApiKey::id`], if it is still there.
    pub fn by_digest(&self, digest: &[u8; DIGEST_BYTES]) -> Option<&ApiKey> {
        self.keys.get(&index(digest)).filter(|key| bool::from(key.digest.ct_eq(digest)))
    }
}

impl ApiKey {
    fn of(entry: &Entry) -> Result<Self, &'static str> {
        let digest = digest_from_hex(&entry.sha256)
            .ok_or("sha256 is not the hash of a key in 64 hexadecimal digits; `limiter key new` makes one")?;
        let user = user_name(&entry.user)
            .ok_or("user is no name: 1 to 128 bytes, without control characters or spaces at its ends")?;
        let Entry { connections, attempts_per_minute, rate, .. } = *entry;
        Ok(Self { digest, user, connections, attempts_per_minute, rate })
    }

    /// Which key it is: its hash.
    pub fn id(&self) -> [u8; DIGEST_BYTES] {
        self.digest
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("user", &self.user).finish_non_exhaustive()
    }
}

/// A key that nobody has yet, and its entry for the file. `None`: the system has no random numbers.
pub fn new_api_key(
    user: &str,
    connections: Option<u32>,
    attempts_per_minute: Option<u32>,
    rate: Option<u32>,
) -> Option<(String, String)> {
    let mut bytes = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut bytes).ok()?;
    let key = format!("{API_KEY_PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes));
    let mut entry = toml_edit::Table::new();
    entry["user"] = toml_edit::value(user);
    entry["sha256"] = toml_edit::value(hex(&digest_of(&key)));
    for (name, limit) in [("connections", connections), ("attempts_per_minute", attempts_per_minute), ("rate", rate)] {
        if let Some(limit) = limit {
            entry[name] = toml_edit::value(i64::from(limit));
        }
    }
    Some((key, format!("[[key]]\n{entry}")))
}

fn digest_of(key: &str) -> [u8; DIGEST_BYTES] {
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(digest::digest(&digest::SHA256, key.as_bytes()).as_ref());
    digest
}

fn index(digest: &[u8; DIGEST_BYTES]) -> [u8; 8] {
    let mut index = [0; 8];
    index.copy_from_slice(&digest[..8]);
    index
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string can't fail.
        _ = write!(text, "{byte:02x}");
        text
    })
}

fn digest_from_hex(text: &str) -> Option<[u8; DIGEST_BYTES]> {
    if text.len() != 2 * DIGEST_BYTES || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; DIGEST_BYTES];
    for (byte, digits) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_new_key_is_found_by_itself_alone() {
        let (alice, entry) = new_api_key("alice \"quoted\"", Some(3), None, None).unwrap();
        let (bob, other) = new_api_key("bob", None, Some(0), None).unwrap();
        assert!(alice.starts_with("lk_") && alice.len() == 46 && alice != bob, "{alice}");
        assert!(!entry.contains(&alice) && !entry.contains(&alice[3..]));
        let keys = ApiKeys::parse(&format!("{entry}\n{other}")).unwrap();
        let found = keys.find(&alice).unwrap();
        assert_eq!((&*found.user, found.connections, found.attempts_per_minute), ("alice \"quoted\"", Some(3), None));
        assert_eq!(found.rate, None);
        assert_eq!(keys.find(&bob).unwrap().attempts_per_minute, Some(0));
        assert_eq!(keys.by_digest(&found.id()), Some(found));
        for wrong in ["", "lk_", &alice[..45], &format!("{alice}A"), &alice.to_lowercase(), &hex(&found.digest)] {
            assert_eq!(keys.find(wrong), None, "{wrong}");
        }
        let almost = {
            let mut id = found.id();
            id[31] ^= 1;
            id
        };
        assert_eq!(keys.by_digest(&almost), None);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_nothing_of_a_key() {
        let hash = "0".repeat(64);
        let good = format!("[[key]]\nuser = \"a\"\nsha256 = \"{hash}\"\n");
        for (text, line, problem) in [
            ("[[key]]\nuser = \"a\"\nsha256 = \"lk_secret\"\n".to_owned(), 1, "64 hexadecimal digits"),
            (format!("[[key]]\nuser = \" a\"\nsha256 = \"{hash}\"\n"), 1, "user is no name"),
            (format!("{good}{good}"), 4, "in the file already"),
            (format!("{good}[[key]]\nuser = \"b\"\n"), 4, "missing field `sha256`"),
            (format!("{good}secret = \"lk_secret\"\n"), 4, "unknown field `secret`"),
            (format!("{good}connections = -1\n"), 4, "invalid value"),
            ("[[key]]\nuser = lk_secret\n".to_owned(), 2, ""),
        ] {
            let (offset, said) = ApiKeys::parse(&text).unwrap_err();
            assert_eq!(super::super::error::line_and_column(&text, offset).0, line, "{text}: {said}");
            assert!(said.contains(problem) && !said.contains("lk_secret"), "{text}: {said}");
        }
        let keys = ApiKeys::parse(&format!("{good}rate = 7\n")).unwrap();
        assert_eq!(keys.by_digest(&[0; 32]).unwrap().rate, Some(7));
        assert!(ApiKeys::parse("").unwrap().keys.is_empty());
        assert!(!format!("{:?}", ApiKeys::parse(&good).unwrap()).contains("sha256"));
    }

    proptest! {
        #[test]
        fn no_file_and_no_key_makes_it_panic(text in "\\PC{0,200}", value in "\\PC{0,70}") {
            let _ = ApiKeys::parse(&text);
            let _ = ApiKeys::parse(&format!("[[key]]\nuser = '{value}'\nsha256 = '{value}'"));
            prop_assert!(ApiKeys::default().find(&value).is_none());
        }
    }
}
