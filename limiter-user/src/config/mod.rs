//! The configuration: the file, the environment, the flags.

mod schema;

pub use schema::*;
