//! A session with a server that says given bytes, whatever they are: shared by the bounded run of
//! `fuzz.rs` and by the coverage-guided one in `fuzz/`.
//!
//! The server pauses before each reply until it has seen that many requests, then closes its side.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vmbackup::block::{BlockSource, Buffer, ByteRange, ExtentKind};
use vmbackup::error::{Error, Result};
use vmbackup::nbd::wire;

use crate::script::Scripted;

/// Length of the one read.
pub const LEN: usize = 1024;
/// Patience where nothing should need it.
pub const LONG: Duration = Duration::from_secs(20);
/// Patience where a damaged handshake may keep the client from ever asking.
pub const SHORT: Duration = Duration::from_millis(5);

/// What a server says, and where it waits for the first and the second request.
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
    for (index, pause) in transcript.pauses.iter().enumerate() {
        let pause = (*pause).min(transcript.bytes.len());
        if stream.write_all(&transcript.bytes[said..pause]).await.is_err() {
            return;
        }
        said = pause;
        if pause < transcript.bytes.len() {
            let listen = listen(&mut stream, &mut heard, index + 1);
            let _ = tokio::time::timeout(patience, listen).await;
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
pub async fn session(transcript: Transcript, patience: Duration) -> Result<()> {
    let server = Scripted::new(move |stream| say(stream, transcript.clone(), patience));
    let client = server.open().await?;
    let map = client.extents(ByteRange::new(0, 65536)).await?;
    assert!(!map.is_empty() && map.end() <= 65536 && map.bytes_of(ExtentKind::Unchanged) == 0);
    let buffer = client.read(0, Buffer::unbudgeted(vec![0xee; LEN])).await?;
    assert_eq!(buffer.len(), LEN);
    Ok(())
}

/// `Closed` without a reason would mean that the connection's task panicked.
pub fn has_a_reason(error: &Error) {
    assert!(!error.to_string().ends_with("is closed"), "{error:?}");
}

/// How the client ends: with a result or a reason, in time.
pub fn ended(transcript: &Transcript) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let session = session(transcript.clone(), SHORT);
    let result = runtime.block_on(async { tokio::time::timeout(LONG, session).await });
    match result.expect("the client ends by itself") {
        Ok(()) => "success".to_owned(),
        Err(error) => {
            has_a_reason(&error);
            error.to_string()
        }
    }
}
