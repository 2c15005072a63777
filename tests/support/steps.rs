//! The steps of the journal at which tests stop and kill a run: the one part of this folder that knows
//! the library, whose `match` without a default makes whoever adds a step say who takes it.

use std::path::Path;

use vmbackup::journal::Phase;

use super::env::TestEnv;

/// Every step that `takes` names, before and after.
pub(crate) fn steps(takes: impl Fn(Phase) -> bool) -> Vec<String> {
    let phases = Phase::ALL.into_iter().filter(|phase| takes(*phase));
    phases.flat_map(|phase| [format!("before:{phase}"), format!("after:{phase}")]).collect()
}

/// Whether a backup of a stopped VM takes this step.
pub(crate) fn stopped_takes(phase: Phase) -> bool {
    match phase {
        Phase::Bitmap | Phase::Process | Phase::Manifest | Phase::Handover => true,
        Phase::Checkpoint
        | Phase::Freeze
        | Phase::Job
        | Phase::Scratch
        | Phase::Node
        | Phase::Pause
        | Phase::Filter
        | Phase::Socket
        | Phase::Export
        | Phase::Temporary
        | Phase::Overwrite
        | Phase::Place
        | Phase::Define
        | Phase::Discard => false,
    }
}

/// Whether after the step at this place of [`steps`] somebody asks for the recovery, and not the next run
/// does it by itself. Of each step it is the one before and the other after it, and the other way round for
/// the next step, so that neither kind of moment is left to one of the two.
pub(crate) fn is_asked_for(at: usize) -> bool {
    (at / 2 + at).is_multiple_of(2)
}

/// What a restore makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restored {
    /// Images and devices.
    Disks,
    /// Images and the domain they belong to.
    Domain,
}

impl Restored {
    /// Whether its restore takes this step.
    pub(crate) fn takes(self, phase: Phase) -> bool {
        match phase {
            Phase::Temporary | Phase::Place | Phase::Discard => true,
            Phase::Overwrite => self == Self::Disks,
            Phase::Define => self == Self::Domain,
            Phase::Checkpoint
            | Phase::Scratch
            | Phase::Node
            | Phase::Socket
            | Phase::Freeze
            | Phase::Pause
            | Phase::Filter
            | Phase::Bitmap
            | Phase::Job
            | Phase::Export
            | Phase::Process
            | Phase::Manifest
            | Phase::Handover => false,
        }
    }
}

/// Writes 2 MiB of one byte into an image that nobody has open.
pub(crate) fn write_pattern(env: &TestEnv, (image, format): (&Path, &str), byte: u8) {
    let command = format!("write -q -P {byte} 1M 2M");
    env.run("qemu-io", &["-f", format, "-c", &command, &image.to_string_lossy()]).ok();
}
