//! Stopping a run at a step of the journal, for tests: `VMBACKUP_STOP_AT=before:freeze`.
//!
//! The process stops itself (SIGSTOP) at the named step; whoever tests what happens then kills it, or
//! does something to the VM and lets it go on. Only in debug builds; a program that is released does
//! not look at the variable.

use crate::error::Result;
use crate::journal::Probe;

/// The probe the environment asks for.
#[cfg(debug_assertions)]
pub(crate) fn probe() -> Result<Option<Probe>> {
    use std::sync::Arc;

    use crate::error::{Error, Kind};
    use crate::journal::{Moment, Phase};

    let Ok(text) = std::env::var("VMBACKUP_STOP_AT") else { return Ok(None) };
    let parsed = text.split_once(':').and_then(|(moment, word)| {
        let moment = match moment {
            "before" => Moment::Before,
            "after" => Moment::After,
            _ => return None,
        };
        Some((Phase::ALL.into_iter().find(|phase| phase.word() == word)?, moment))
    });
    let Some(wanted) = parsed else {
        let message = format!("VMBACKUP_STOP_AT: '{text}' is no step");
        return Err(Error::new(Kind::Usage, message).hint("before:PHASE or after:PHASE"));
    };
    Ok(Some(Arc::new(move |phase, moment| {
        if (phase, moment) == wanted {
            let itself = rustix::process::getpid();
            // Comes back when somebody sends SIGCONT.
            let _ = rustix::process::kill_process(itself, rustix::process::Signal::STOP);
        }
    })))
}

/// None.
#[cfg(not(debug_assertions))]
#[expect(clippy::unnecessary_wraps, reason = "the same as in debug builds")]
pub(crate) fn probe() -> Result<Option<Probe>> {
    Ok(None)
}
