//! `vmbackup serve`: points and images for real NBD clients, and a guest that boots from a point.

#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod changed_by_hand;
mod changes;
mod guest;
mod guestfish;
mod images;
mod inspect;
mod points;
mod rig;
