//! One command per file: its arguments, and `run`, which resolves them, calls a job, prints.

pub(crate) mod backup;
pub(crate) mod check;
pub(crate) mod copy;
pub(crate) mod forget;
pub(crate) mod full;
pub(crate) mod gc;
pub(crate) mod guardian;
pub(crate) mod hash;
pub(crate) mod incremental;
pub(crate) mod list;
pub(crate) mod nbd;
pub(crate) mod plan;
pub(crate) mod recover;
pub(crate) mod repo;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod show;
pub(crate) mod verify;
