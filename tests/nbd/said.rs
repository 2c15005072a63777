//! A session with a server that says given bytes, whatever they are: shared by the bounded run of
//! `fuzz.rs` and by the coverage-guided one in `fuzz/`.
//!
//! The server pauses before each reply until it has seen that many requests, then closes its side.
//! What the client wants of it is one of the kinds of [`Session`].

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vmbackup::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ZeroMode};
use vmbackup::error::{Error, Result};
use vmbackup::nbd::tls::{ClientTls, Credentials, Mode, PeerCheck};
use vmbackup::nbd::{
    Access, Client, ClientOptions, Durable, InitialContent, Order, Which, describe, list, wire,
};

use crate::script::{Scripted, timeouts};

/// Length of the one read and of the one write.
pub const LEN: usize = 1024;
/// Patience where nothing should need it.
pub const LONG: Duration = Duration::from_secs(20);
/// Patience where a damaged handshake may keep the client from ever asking.
pub const SHORT: Duration = Duration::from_millis(5);

/// What a client wants of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// A question about the disk and a read.
    Read,
    /// All it tells of all its exports: LIST, INFO, LIST_META_CONTEXT.
    Look,
    /// Every command that changes the disk, and how it is at first.
    Write,
    /// To read in TLS, or without it if it has none: STARTTLS.
    Secure,
}

impl Session {
    /// In the order by which inputs of `fuzz/` name them (its `seeds.rs` has it, too).
    pub const ALL: [Self; 4] = [Self::Read, Self::Look, Self::Write, Self::Secure];

    /// The folder of its corpus.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Look => "look",
            Self::Write => "write",
            Self::Secure => "secure",
        }
    }
}

/// What a server says, and where it waits for the first, the second … request.
#[derive(Clone)]
pub struct Transcript {
    pub bytes: Vec<u8>,
    pub pauses: Vec<usize>,
}

impl Transcript {
    /// Cut where it waits.
    pub fn parts(&self) -> Vec<Vec<u8>> {
        let mut parts = Vec::new();
        let mut start = 0;
        for pause in &self.pauses {
            let pause = (*pause).min(self.bytes.len());
            parts.push(self.bytes[start..pause].to_vec());
            start = pause;
        }
        parts.push(self.bytes[start..].to_vec());
        parts
    }

    pub fn of(parts: &[Vec<u8>]) -> Self {
        let mut bytes = Vec::new();
        let mut pauses = Vec::new();
        for part in parts {
            bytes.extend(part);
            pauses.push(bytes.len());
        }
        // The last part is followed by the end.
        pauses.pop();
        Self { bytes, pauses }
    }
}

/// Says the transcript; waits no longer than `patience` for a request that may never come.
async fn say(mut stream: DuplexStream, transcript: Transcript, patience: Duration) {
    let mut heard = Vec::new();
    let mut said = 0;
    // Who was waited for in vain is not waited for again: it hears the rest and is done.
    let mut listens = true;
    for (index, pause) in transcript.pauses.iter().enumerate() {
        let pause = (*pause).min(transcript.bytes.len());
        if stream.write_all(&transcript.bytes[said..pause]).await.is_err() {
            return;
        }
        said = pause;
        if listens && pause < transcript.bytes.len() {
            let listen = listen(&mut stream, &mut heard, index + 1);
            listens = tokio::time::timeout(patience, listen).await.is_ok();
        }
    }
    if stream.write_all(&transcript.bytes[said..]).await.is_ok() && stream.shutdown().await.is_ok()
    {
        listen(&mut stream, &mut heard, usize::MAX).await;
    }
}

/// Hears what the client says until it has made `requests` requests or hangs up.
async fn listen(stream: &mut DuplexStream, heard: &mut Vec<u8>, requests: usize) {
    let magics = [wire::REQUEST.to_be_bytes(), wire::REQUEST_EXTENDED.to_be_bytes()];
    while heard.windows(4).filter(|four| magics.iter().any(|m| four == m)).count() < requests {
        if stream.read_buf(heard).await.is_ok_and(|n| n == 0) {
            return;
        }
    }
}

/// The session against a server that says this.
pub async fn session(about: Session, transcript: Transcript, patience: Duration) -> Result<()> {
    let server = Scripted::new(move |stream| say(stream, transcript.clone(), patience));
    match about {
        Session::Read => read(&server.open().await?).await,
        Session::Look => look(&server).await,
        Session::Write => {
            let access = Access::Write(InitialContent::Unknown);
            let options = ClientOptions { access, ..ClientOptions::default() };
            write(&server.open_with(options).await?).await
        }
        Session::Secure => {
            let tls = ClientTls {
                mode: Mode::Allowed,
                peer_check: PeerCheck::Ignore,
                ..ClientTls::required(Credentials::SystemAuthorities)
            };
            read(&server.with_tls(tls).open().await?).await
        }
    }
}

async fn read(client: &Client) -> Result<()> {
    let map = client.extents(ByteRange::new(0, 65536)).await?;
    assert!(!map.is_empty() && map.end() <= 65536 && map.bytes_of(ExtentKind::Unchanged) == 0);
    let buffer = client.read(0, Buffer::unbudgeted(vec![0xee; LEN])).await?;
    assert_eq!(buffer.len(), LEN);
    Ok(())
}

/// Ends with the first failure, which may be that of one export.
async fn look(server: &Scripted) -> Result<()> {
    let all = describe(server, Which::All, timeouts()).await?;
    let mut end = Ok(());
    for export in all.exports {
        let name = export.listed.name;
        assert!(name.len() <= 3 * wire::STRING_BYTES_MAX, "as text it is at most that much longer");
        match export.told {
            Ok(told) => assert!(i64::try_from(told.info.size_bytes).is_ok()),
            Err(error) => {
                has_a_reason(&error);
                end = end.and(Err(error));
            }
        }
    }
    // What was just told is told again, with nothing asked before.
    if let Err(error) = list(server, timeouts()).await {
        has_a_reason(&error);
    }
    end
}

/// Does it all, whatever failed before, and ends with the first failure.
async fn write(client: &Client) -> Result<()> {
    let range = ByteRange::new(0, LEN as u64);
    let data = Buffer::unbudgeted(vec![0x77; LEN]);
    let ends = [
        client.order(Order::Write(0, data), Durable::Yes).await,
        client.zero(range, ZeroMode::Sparse).await,
        client.zero(range, ZeroMode::FastOnly).await,
        client.order(Order::Trim(range), Durable::Later).await,
        client.order(Order::Cache(range), Durable::Later).await,
        client.flush().await,
    ];
    ends.iter().filter_map(|end| end.as_ref().err()).for_each(has_a_reason);
    ends.into_iter().collect()
}

/// `Closed` without a reason would mean that the connection's task panicked.
pub fn has_a_reason(error: &Error) {
    assert!(!error.to_string().ends_with("is closed"), "{error:?}");
}

/// How the client ends: with a result or a reason, in time.
pub fn ended(about: Session, transcript: &Transcript) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let session = session(about, transcript.clone(), SHORT);
    let result = runtime.block_on(async { tokio::time::timeout(LONG, session).await });
    match result.expect("the client ends by itself") {
        Ok(()) => "success".to_owned(),
        Err(error) => {
            has_a_reason(&error);
            ours(&error.to_string())
        }
    }
}

/// What is our own in an error: the rest of it is the server's.
fn ours(text: &str) -> String {
    let pieces = match text {
        // Command, and what the error number means.
        _ if text.contains(" failed ") => 2,
        _ if text.contains("broke the protocol") => usize::MAX,
        _ => 1,
    };
    text.split(": ").take(pieces).collect::<Vec<_>>().join(": ")
}
