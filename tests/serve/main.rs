//! `vmbackup serve`: points and images for real NBD clients, guests with a point as their disk, and
//! one that starts from it.

#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod changed_by_hand;
mod changes;
mod firmware;
mod guest;
mod guestfish;
mod images;
mod inspect;
mod points;
mod rig;
