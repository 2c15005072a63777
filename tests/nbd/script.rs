//! A scripted NBD server in this process: honest up to the point where a test makes it lie.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vmbackup::error::Result;
use vmbackup::nbd::tls::ClientTls;
use vmbackup::nbd::wire::{self, HeaderStyle, be32, be64, chunk, export, info, option, reply};
use vmbackup::nbd::{Client, ClientOptions, Connector, Stream, Timeouts};

/// Size of the export.
pub const SIZE: u64 = 1 << 20;
/// Id of the one meta context.
pub const CONTEXT: u32 = 7;

type Script = dyn Fn(DuplexStream) -> tokio::task::JoinHandle<()> + Send + Sync;

/// Connects to a script, which gets the other end of the stream.
pub struct Scripted {
    script: Box<Script>,
    tls: Option<ClientTls>,
}

impl Scripted {
    pub fn new<F: Future<Output = ()> + Send + 'static>(
        script: impl Fn(DuplexStream) -> F + Send + Sync + 'static,
    ) -> Self {
        Self { script: Box::new(move |stream| tokio::spawn(script(stream))), tls: None }
    }

    /// The same, asked for TLS.
    pub fn with_tls(self, tls: ClientTls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    pub async fn open(&self) -> Result<Client> {
        self.open_with(ClientOptions::default()).await
    }

    /// With these options but for the time-outs.
    pub async fn open_with(&self, options: ClientOptions) -> Result<Client> {
        Client::open(self, "", ClientOptions { timeouts: timeouts(), ..options }).await
    }
}

/// Nothing waits for long.
pub fn timeouts() -> Timeouts {
    let second = std::time::Duration::from_secs(1);
    Timeouts { handshake: 5 * second, stall: 5 * second, slow: 5 * second }
}

#[async_trait]
impl Connector for Scripted {
    fn peer(&self) -> Arc<str> {
        "the script".into()
    }

    async fn connect(&self) -> Result<Box<dyn Stream>> {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        (self.script)(theirs);
        Ok(Box::new(ours))
    }

    fn tls(&self) -> Option<&ClientTls> {
        self.tls.as_ref()
    }
}

/// A request as the script sees it.
pub struct Asked {
    pub style: HeaderStyle,
    pub cookie: u64,
    pub offset: u64,
}

impl Asked {
    /// A chunk in answer.
    pub fn chunk(&self, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        chunk_of(self.style, (flags, kind), self.cookie, self.offset, payload)
    }

    /// A data chunk of `len` bytes of 0x55 at `offset`.
    pub fn data(&self, flags: u16, offset: u64, len: usize) -> Vec<u8> {
        let mut payload = offset.to_be_bytes().to_vec();
        payload.resize(8 + len, 0x55);
        self.chunk(flags, chunk::OFFSET_DATA, &payload)
    }

    /// A status chunk of 32-bit extents.
    pub fn status(&self, flags: u16, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        let mut payload = id.to_be_bytes().to_vec();
        for (len, flags) in extents {
            payload.extend(len.to_be_bytes());
            payload.extend(flags.to_be_bytes());
        }
        self.chunk(flags, chunk::BLOCK_STATUS, &payload)
    }

    pub fn simple(&self, error: u32) -> Vec<u8> {
        simple(error, self.cookie)
    }
}

pub fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut out = wire::REPLY_SIMPLE.to_be_bytes().to_vec();
    out.extend(error.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out
}

pub fn chunk_of(
    style: HeaderStyle,
    (flags, kind): (u16, u16),
    cookie: u64,
    offset: u64,
    payload: &[u8],
) -> Vec<u8> {
    let extended = style == HeaderStyle::Extended;
    let magic = if extended { wire::REPLY_EXTENDED } else { wire::REPLY_STRUCTURED };
    let mut out = magic.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    if extended {
        out.extend(offset.to_be_bytes());
        out.extend((payload.len() as u64).to_be_bytes());
    } else {
        out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    }
    out.extend(payload);
    out
}

/// An error chunk's payload.
pub fn error_payload(errno: u32, message: &[u8]) -> Vec<u8> {
    let mut out = errno.to_be_bytes().to_vec();
    out.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    out.extend(message);
    out
}

pub fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::OPTION_REPLY.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend(payload);
    out
}

pub fn greeting() -> Vec<u8> {
    let mut out = wire::GREETING.to_be_bytes().to_vec();
    out.extend(wire::IHAVEOPT.to_be_bytes());
    out.extend([0, 3]);
    out
}

/// INFO_EXPORT of `size`, in answer to GO.
pub fn info_export(size: u64) -> Vec<u8> {
    info_flags(size, export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_WRITE_ZEROES)
}

/// The same with these abilities.
pub fn info_flags(size: u64, flags: u16) -> Vec<u8> {
    let mut payload = info::EXPORT.to_be_bytes().to_vec();
    payload.extend(size.to_be_bytes());
    payload.extend(flags.to_be_bytes());
    option_reply(option::GO, reply::INFO, &payload)
}

pub fn info_block_size(sizes: [u32; 3]) -> Vec<u8> {
    let mut payload = info::BLOCK_SIZE.to_be_bytes().to_vec();
    payload.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    option_reply(option::GO, reply::INFO, &payload)
}

/// What an honest server of `style` says to `option`.
pub fn honest(style: HeaderStyle, option: u32) -> Vec<u8> {
    let ack = || option_reply(option, reply::ACK, &[]);
    match option {
        option::EXTENDED_HEADERS if style == HeaderStyle::Extended => ack(),
        option::STRUCTURED_REPLY if style == HeaderStyle::Structured => ack(),
        option::SET_META_CONTEXT => {
            let mut payload = CONTEXT.to_be_bytes().to_vec();
            payload.extend(b"base:allocation");
            [option_reply(option, reply::META_CONTEXT, &payload), ack()].concat()
        }
        option::GO => [info_export(SIZE), info_block_size([1, 4096, 32 << 20]), ack()].concat(),
        _ => option_reply(option, reply::UNSUP, &[]),
    }
}

/// Plays the server: `say` answers options, `act` requests; ends when the client does.
pub async fn play(
    mut stream: DuplexStream,
    style: HeaderStyle,
    say: impl Fn(u32) -> Vec<u8>,
    act: impl Fn(&Asked) -> Vec<u8>,
) {
    stream.write_all(&greeting()).await.unwrap();
    let mut flags = [0; 4];
    if stream.read_exact(&mut flags).await.is_err() {
        return;
    }
    loop {
        let mut header = [0; 16];
        if stream.read_exact(&mut header).await.is_err() {
            return;
        }
        let option = be32(&header[8..12]);
        let mut payload = vec![0; be32(&header[12..]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        if stream.write_all(&say(option)).await.is_err() {
            return;
        }
        if option == option::GO || option == option::EXPORT_NAME {
            break;
        }
    }
    let len = if style == HeaderStyle::Extended { 32 } else { 28 };
    loop {
        let mut header = vec![0; len];
        if stream.read_exact(&mut header).await.is_err() {
            return;
        }
        let (cookie, offset) = (be64(&header[8..16]), be64(&header[16..24]));
        let asked = Asked { style, cookie, offset };
        if stream.write_all(&act(&asked)).await.is_err() {
            return;
        }
    }
}
