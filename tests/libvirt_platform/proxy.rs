//! A way to the daemon that can be cut, as a restart of the daemon cuts it, or slow.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmbackup::control::Control;
use vmbackup::journal::{Journals, Moment, Phase};
use vmbackup::platform::libvirt::Libvirt;
use vmbackup::platform::{Platform, VmSnapshot};

use crate::bare::{Bare, request};
use crate::support::TestEnv;

/// The program number of keep-alive messages (libvirt, `src/rpc/virkeepaliveprotocol.x`).
const KEEPALIVE: u32 = 0x6b65_6570;

#[derive(Clone)]
pub(crate) struct Proxy {
    path: PathBuf,
    /// Both ends of each connection: the client's and the daemon's.
    open: Arc<Mutex<Vec<[UnixStream; 2]>>>,
    refuses: Arc<AtomicBool>,
    /// Whether what the daemon says is kept back.
    pub(crate) holds: Arc<AtomicBool>,
    calls: Arc<Mutex<Calls>>,
}

/// What clients say to the daemon.
#[derive(Default)]
struct Calls {
    /// Whether the next is kept back.
    holds_next: bool,
    /// The one that was kept back, and where it goes.
    held: Option<(UnixStream, Vec<u8>)>,
}

impl Proxy {
    pub(crate) fn start(env: &TestEnv) -> Self {
        let proxy = Self {
            path: env.path("libvirt.sock"),
            open: Arc::default(),
            refuses: Arc::default(),
            holds: Arc::default(),
            calls: Arc::default(),
        };
        let listener = UnixListener::bind(&proxy.path).expect("own directory");
        let listening = proxy.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if !listening.refuses.load(Ordering::SeqCst) {
                    listening.connect(client);
                }
            }
        });
        proxy
    }

    fn connect(&self, client: UnixStream) {
        let daemon = UnixStream::connect("/run/libvirt/libvirt-sock").expect("libvirtd");
        self.open.lock().expect("whole").push([clone(&client), clone(&daemon)]);
        let (mut from, to, calls) = (clone(&client), clone(&daemon), Arc::clone(&self.calls));
        std::thread::spawn(move || {
            while let Some(call) = message(&mut from) {
                let mut calls = calls.lock().expect("whole");
                if calls.holds_next && call[4..8] != KEEPALIVE.to_be_bytes() {
                    calls.holds_next = false;
                    calls.held = Some((clone(&to), call));
                } else if (&to).write_all(&call).is_err() {
                    break;
                }
            }
            // What is held is yet to arrive.
            if calls.lock().expect("whole").held.is_none() {
                let _ = to.shutdown(Shutdown::Both);
            }
        });
        let (mut from, mut to, holds) = (daemon, client, Arc::clone(&self.holds));
        std::thread::spawn(move || {
            let mut said = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from.read(&mut said) {
                while holds.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                if to.write_all(&said[..count]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    }

    pub(crate) fn cut(&self) {
        for stream in self.open.lock().expect("whole").drain(..).flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Cuts, and lets nobody through for a while, as a daemon that is stopped.
    pub(crate) fn stop_for(&self, pause: Duration) {
        self.stop();
        let stopped = self.clone();
        std::thread::spawn(move || {
            std::thread::sleep(pause);
            stopped.go_on();
        });
    }

    pub(crate) fn stop(&self) {
        self.refuses.store(true, Ordering::SeqCst);
        self.cut();
    }

    /// Lets who comes anew through again.
    pub(crate) fn go_on(&self) {
        self.refuses.store(false, Ordering::SeqCst);
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().expect("whole")
    }

    /// Keeps the next call back. The connection lives.
    pub(crate) fn hold_next_call(&self) {
        self.calls().holds_next = true;
    }

    /// Whether a call is on its way.
    pub(crate) fn has_call(&self) -> bool {
        self.calls().held.is_some()
    }

    /// Cuts off who called, but not what is on its way. Who comes anew is let through.
    pub(crate) fn cut_callers(&self) {
        for [client, _] in self.open.lock().expect("whole").iter() {
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    /// What was kept back arrives.
    pub(crate) fn call_arrives(&self) {
        let (mut to, call) = self.calls().held.take().expect("a call");
        to.write_all(&call).expect("the daemon is there");
    }

    /// The URI of libvirt through here.
    pub(crate) fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.path.display())
    }

    /// The domain through here, with something done at a step.
    pub(crate) async fn at(
        &self,
        bare: &Bare<'_>,
        step: (Phase, Moment),
        act: impl Fn() + Send + Sync + 'static,
    ) -> Libvirt {
        let probe = move |phase, moment| {
            if (phase, moment) == step {
                act();
            }
        };
        let mut options = bare.options();
        options.uri = Some(self.uri());
        options.journals = Journals::new(bare.env.path("state/journal"), Some(Arc::new(probe)));
        Libvirt::open(options).await.expect("connects")
    }

    /// A snapshot of the domain that is taken through here.
    pub(crate) async fn snapshot(&self, bare: &Bare<'_>) -> Box<dyn VmSnapshot> {
        let mut options = bare.options();
        options.uri = Some(self.uri());
        let platform = Libvirt::open(options).await.expect("connects");
        platform.open_snapshot(&request(1), &Control::new()).await.expect("opens")
    }
}

fn clone(stream: &UnixStream) -> UnixStream {
    stream.try_clone().expect("own socket")
}

/// One message: its length with these four bytes, the program, and what it says (`src/rpc/virnetprotocol.x`).
fn message(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut whole = vec![0; 4];
    from.read_exact(&mut whole).ok()?;
    let length = u32::from_be_bytes([whole[0], whole[1], whole[2], whole[3]]);
    whole.resize(usize::try_from(length).ok()?, 0);
    from.read_exact(&mut whole[4..]).ok()?;
    Some(whole)
}
