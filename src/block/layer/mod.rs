//! Layers: a disk around a disk, with one thing added.

pub mod cache;
pub mod faulty;
pub mod grown;
pub mod pace;
pub mod throttle;
