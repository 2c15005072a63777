//! Layers: a disk around a disk, with one thing added.

pub mod faulty;
pub mod throttle;
