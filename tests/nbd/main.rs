//! The NBD client against real servers and hostile ones.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod corpus;
mod debian;
mod failing;
mod fuzz;
mod hostile;
mod leaving;
#[path = "../support/listening.rs"]
mod listening;
mod looking;
mod real;
mod said;
mod script;
mod slow;
mod support;
mod transcripts;
mod uris;
mod vsock;
mod written;
