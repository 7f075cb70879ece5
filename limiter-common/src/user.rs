//! Users: what a connection counts against once its client has shown the gateway who it is.

use crate::SourceKey;

/// Longest name of a user, in bytes.
pub const USER_NAME_BYTES: usize = 128;

/// A user's name as it lies in a map: UTF-8, filled up with zeros. For user space alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct UserName(pub [u8; USER_NAME_BYTES]);

impl Default for UserName {
    fn default() -> Self {
        Self([0; USER_NAME_BYTES])
    }
}

/// The user that a connection counts against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Member {
    /// What the programs count by, see [`SourceKey::of_user`].
    pub source: SourceKey,
    /// What people call it.
    pub name: UserName,
}

#[cfg(feature = "user")]
mod host {
    use super::{Member, USER_NAME_BYTES, UserName};

    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for Member {}

    impl UserName {
        /// `None` if the name is longer than [`USER_NAME_BYTES`].
        pub fn new(name: &str) -> Option<Self> {
            let mut bytes = [0; USER_NAME_BYTES];
            bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
            Some(Self(bytes))
        }

        /// The name; what is not UTF-8 is replaced.
        pub fn to_string_lossy(&self) -> String {
            let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(self.0.len());
            String::from_utf8_lossy(&self.0[..end]).into_owned()
        }
    }
}
