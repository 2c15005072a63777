//! An NBD server started by a command line: nbdkit and whatever takes its socket as `nbdcopy -- [ … ]`
//! passes it, which is systemd's socket activation (`sd_listen_fds(3)`).
//!
//! The server listens on a socket of ours in a private directory, so nobody else reaches it and
//! there is no moment at which it is not there yet. It ends with [`CommandServer::stop`], and as
//! every [`OwnChild`] does.

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::child::{OwnChild, Passed};
use super::private::PrivateDir;
use super::tool::failed;
use crate::error::{Error, Kind, Result};
use crate::nbd::{Client, ClientOptions, Connector, Stream};

/// Longest wait for a server that broke its connection to end as well.
const BROKEN: Duration = Duration::from_millis(500);

/// A running server and its socket.
pub struct CommandServer {
    name: String,
    child: Mutex<OwnChild>,
    directory: PrivateDir,
}

impl CommandServer {
    /// Starts `line`: program and arguments.
    pub async fn start(line: &[String]) -> Result<Arc<Self>> {
        let name = format!("[ {} ]", line.join(" "));
        let directory = PrivateDir::create()?;
        let listening = UnixListener::bind(directory.path().join("nbd"))
            .map_err(|e| Error::io("cannot listen on a private socket", e))?;
        let line: Vec<OsString> = line.iter().map(OsString::from).collect();
        let child = OwnChild::spawn(line, Passed::Listening(listening.into()))
            .await
            .map_err(|e| Error::io(format!("cannot start {name}"), e))?;
        Ok(Arc::new(Self { name, child: Mutex::new(child), directory }))
    }

    /// Opens its default export.
    pub async fn open(&self, options: ClientOptions) -> Result<Client> {
        let connector =
            Private { socket: self.directory.path().join("nbd"), name: self.name.clone() };
        let opened = Box::pin(Client::open(&connector, "", options)).await;
        let Err(error) = opened else { return opened };
        // What the program said is better than "connection lost".
        let mut child = self.child.lock().await;
        match tokio::time::timeout(BROKEN, child.child.wait()).await {
            Ok(Ok(status)) => {
                let said = child.last_words().await;
                let why = if said.is_empty() { format!("it ended with {status}") } else { said };
                Err(failed(&format!("start {}", self.name), &why))
            }
            _ => Err(error),
        }
    }

    /// Asks it to end (SIGTERM) and waits until it has, at most for `limit`: what it was given is then
    /// as safe as it makes it. An exit status other than success is an error, with what it said.
    pub async fn stop(&self, limit: Duration) -> Result<()> {
        let mut child = self.child.lock().await;
        let pid = child.child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // Not there any more: its status tells.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let ended = tokio::time::timeout(limit, child.child.wait()).await;
        let status = ended
            .map_err(|_| Error::new(Kind::Timeout, format!("{} does not end", self.name)))?
            .map_err(|e| Error::io(format!("cannot wait for {}", self.name), e))?;
        let by_term = std::os::unix::process::ExitStatusExt::signal(&status)
            == Some(rustix::process::Signal::TERM.as_raw());
        if status.success() || by_term {
            return Ok(());
        }
        let said = child.last_words().await;
        Err(failed(&format!("end {} well ({status})", self.name), &said))
    }
}

/// Reaches the socket of the server.
struct Private {
    socket: PathBuf,
    name: String,
}

#[async_trait]
impl Connector for Private {
    fn peer(&self) -> Arc<str> {
        self.name.as_str().into()
    }

    async fn connect(&self) -> Result<Box<dyn Stream>> {
        let failed = |e| Error::io(format!("cannot connect to {}", self.name), e);
        Ok(Box::new(UnixStream::connect(&self.socket).await.map_err(failed)?))
    }
}
