//! The deduplicating repository: complete restore points out of shared, sealed chunks.
//!
//! Invariants kept here: *Commit order* (chunks durable → index durable → manifest, the commit
//! point), *Deletion* (only the collector deletes objects), *Secrets* (keys appear in no message
//! and no `Debug`). `docs/repository-format.md` specifies every byte.

pub mod seal;
pub mod store;
