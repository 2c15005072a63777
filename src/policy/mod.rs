//! Decisions about points in time, as pure functions: no input or output, no clock.
//!
//! [`retention`] says which points of a VM stay and why. Called by `job::forget`; policies in
//! files and schedules come to live here too.

pub mod retention;
