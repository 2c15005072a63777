//! Peers of our own: one that plays a transcript, one that records it, one that follows a script.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::{Address, Monitor, Options};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

pub(crate) const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "#,
    r#""capabilities": ["oob"]}}"#,
    "\r\n"
);

/// Deadlines short enough for a peer that never answers.
pub(crate) const SHORT: Options =
    Options { greeting: Duration::from_millis(300), command: Duration::from_millis(300) };

/// A listener in a temporary directory.
pub(crate) struct Listener {
    listener: UnixListener,
    dir: tempfile::TempDir,
}

impl Listener {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("qmp").tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        Self { listener, dir }
    }

    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.dir.path().join("s"))
    }

    pub(crate) async fn accept(&self) -> Peer {
        let (reader, writer) = self.listener.accept().await.unwrap().0.into_split();
        Peer { reader: BufReader::new(reader), writer }
    }
}

/// The server's end of a connection.
pub(crate) struct Peer {
    pub(crate) reader: BufReader<OwnedReadHalf>,
    pub(crate) writer: OwnedWriteHalf,
}

impl Peer {
    pub(crate) async fn say(&mut self, text: &str) {
        self.writer.write_all(text.as_bytes()).await.unwrap();
    }

    /// The next command, or `None` at the end.
    pub(crate) async fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).await.unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    pub(crate) async fn answer(&mut self, command: &Value, value: &str) {
        self.say(&format!("{{\"return\": {value}, \"id\": {}}}\n", command["id"])).await;
    }

    /// Greets and lets the client negotiate.
    pub(crate) async fn open(&mut self) {
        self.say(GREETING).await;
        let negotiate = self.hear().await.unwrap();
        assert_eq!(negotiate["execute"], "qmp_capabilities");
        assert_eq!(negotiate["arguments"]["enable"][0], "oob");
        self.answer(&negotiate, "{}").await;
    }
}

/// A monitor connected to a scripted peer that has greeted.
pub(crate) async fn scripted(options: Options) -> (Monitor, Peer) {
    let listener = Listener::new();
    let (address, serve) = (listener.address(), async {
        let mut peer = listener.accept().await;
        peer.open().await;
        peer
    });
    let (monitor, peer) = tokio::join!(Monitor::connect(&address, options), serve);
    (monitor.unwrap(), peer)
}

/// Plays a transcript: `< ` lines are said, `> ` lines must be heard, as JSON, in that order.
pub(crate) async fn play(transcript: &str) -> (Monitor, JoinHandle<()>) {
    let listener = Listener::new();
    let address = listener.address();
    let transcript = transcript.to_owned();
    let playing = tokio::spawn(async move {
        let mut peer = listener.accept().await;
        for line in transcript.lines().filter(|line| !line.starts_with('#')) {
            match line.split_at(2) {
                ("< ", text) => peer.say(&format!("{text}\r\n")).await,
                ("> ", text) => {
                    let expected: Value = serde_json::from_str(text).unwrap();
                    assert_eq!(peer.hear().await, Some(expected));
                }
                _ => panic!("not a line of a transcript: {line}"),
            }
        }
        assert_eq!(peer.hear().await, None, "the client says more than the transcript");
    });
    let monitor = Monitor::connect(&address, Options::default()).await.unwrap();
    (monitor, playing)
}

/// Stands between a client and a monitor and writes down what both say.
pub(crate) async fn record(monitor: PathBuf, listener: Listener, to: &Path) {
    let mut text = b"# Recorded from QEMU; replay.rs says how to renew it.\n".to_vec();
    let mut client = listener.accept().await;
    let (qemu_reader, mut qemu_writer) = UnixStream::connect(monitor).await.unwrap().into_split();
    let mut qemu_reader = BufReader::new(qemu_reader);
    let (mut said, mut heard) = (Vec::new(), Vec::new());
    loop {
        // `read_until`, unlike `read_line`, keeps what it has when the other branch wins.
        tokio::select! {
            read = client.reader.read_until(b'\n', &mut heard) => {
                if read.unwrap() == 0 {
                    break;
                }
                text.extend_from_slice(&[b"> ", heard.as_slice()].concat());
                qemu_writer.write_all(&heard).await.unwrap();
                heard.clear();
            }
            read = qemu_reader.read_until(b'\n', &mut said) => {
                if read.unwrap() == 0 {
                    break;
                }
                text.extend_from_slice(&[b"< ", said.trim_ascii_end(), b"\n"].concat());
                client.writer.write_all(&said).await.unwrap();
                said.clear();
            }
        }
    }
    std::fs::write(to, text).unwrap();
}
