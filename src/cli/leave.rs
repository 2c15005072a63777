//! Ending the process without the exit handlers of the C libraries it has loaded.
//!
//! Threads may still be inside libvirt then: its event loop always, a call that never came back
//! sometimes. `exit` would run the libraries' destructors under their feet (seen with libvirt 11.3:
//! a backup that had succeeded and said so was ended by a signal on a loaded
//! machine). Nothing of ours waits for exit handlers: what has to be durable is by now, and what has
//! to be undone was.
#![allow(unsafe_code)] // One call; there is no safe wrapper of it.

use std::io::Write;

/// Ends the process with this status, at once.
pub fn leave(status: u8) -> ! {
    // Both are flushed where they are written, with their errors reported; this is for the rest.
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    // SAFETY: takes a number, touches no memory of ours, and does not return.
    unsafe { nix::libc::_exit(status.into()) }
}
