//! The freeze guardian as a process of its own: the job behind the command that backups start.
//!
//! What it does is [`crate::freeze`]'s; here the platform is found that reaches the guest's agent.

use std::os::unix::net::UnixStream;

use crate::error::{Error, Kind, Result};
use crate::freeze::{self, Freezable, Line, Subject};
use crate::platform::qemu::{AgentChannel, PausedGuest};

pub use crate::freeze::COMMAND;

/// Guards the guest that the run at the other end of `stream` names, until nothing is left to do.
///
/// Not cancel-safe: ended in between it leaves the guest as it is.
pub async fn run(stream: UnixStream) -> Result<()> {
    let line = Line::new(stream);
    let mut line = line.map_err(|error| Error::io("cannot use the line to the backup", error))?;
    let Some(subject) = line.subject().await else {
        return Err(Error::new(Kind::Usage, "this command is started by backups, not by people"));
    };
    let guest: Box<dyn Freezable> = match subject {
        #[cfg(feature = "libvirt")]
        Subject::Libvirt { uri, domain } => {
            Box::new(crate::platform::libvirt::DomainAgent::new(uri, domain))
        }
        #[cfg(not(feature = "libvirt"))]
        Subject::Libvirt { .. } => {
            return Err(Error::new(Kind::Unsupported, "this program was built without libvirt"));
        }
        Subject::Agent { socket } => Box::new(AgentChannel::new(socket)),
        Subject::Paused { monitor, marker } => Box::new(PausedGuest::new(monitor, marker)),
    };
    freeze::serve(guest, line).await;
    Ok(())
}
