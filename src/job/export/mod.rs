//! Looking at NBD exports, whoever serves them: what they are, what their contexts say, some bytes.
//!
//! Nothing is changed and nothing is stored.

pub mod info;
pub mod map;
pub mod read;
