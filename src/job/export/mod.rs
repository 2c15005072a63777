//! NBD exports by hand, whoever serves them: what they are, what their contexts say, how fast they
//! answer, some bytes of them, and changes of some bytes.
//!
//! Nothing is changed but by `write` and by a benchmark that was told to overwrite.

pub mod bench;
mod content;
pub mod info;
pub mod map;
pub mod read;
pub mod write;
