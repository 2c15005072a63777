//! A client that says what it likes, byte by byte, and the words it needs for that.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::error::Result;
use vmbackup::nbd::server::{Export, Exports, Limits, Server};
use vmbackup::nbd::wire::{self, HeaderStyle, Request, be16, be32, be64, option, reply};

/// Size of the served disk.
pub const SIZE: u64 = 1 << 20;
/// Patience where nothing should need it.
pub const LONG: std::time::Duration = std::time::Duration::from_secs(20);

/// A session of the server and our end of it.
pub struct Raw {
    pub stream: DuplexStream,
    pub session: JoinHandle<Result<()>>,
    pub server: Server,
}

/// A writable export "a" and a read-only one "b".
pub fn server(limits: Limits) -> Server {
    let disk = Arc::new(MemoryDisk::with_content(vec![0x5a; 1 << 20]));
    let a = Export::writable("a", Arc::clone(&disk) as _, Arc::clone(&disk) as _)
        .with_changes("x", Arc::clone(&disk) as _);
    Server::new(Exports::new([a, Export::read_only("b", disk)]).unwrap(), limits)
}

impl Raw {
    /// Connects and reads the greeting; says nothing yet.
    pub async fn connect(limits: Limits) -> Self {
        let server = server(limits);
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let serving = server.clone();
        let session =
            tokio::spawn(async move { serving.session(Box::new(theirs), "the script").await });
        let mut raw = Self { stream: ours, session, server };
        let greeting = raw.read(18).await;
        assert_eq!(be64(&greeting[..8]), wire::GREETING);
        assert_eq!(be64(&greeting[8..16]), wire::IHAVEOPT);
        assert_eq!(be16(&greeting[16..]), 3);
        raw
    }

    /// Connects and says that it is a fixed newstyle client.
    pub async fn haggling() -> Self {
        let mut raw = Self::connect(crate::rig::limits()).await;
        raw.send(&3_u32.to_be_bytes()).await;
        raw
    }

    /// In transmission on export "a", in the given style, with both contexts.
    pub async fn transmitting(style: HeaderStyle) -> Self {
        let mut raw = Self::haggling().await;
        raw.enter(style).await;
        raw
    }

    pub async fn enter(&mut self, style: HeaderStyle) {
        let agree = match style {
            HeaderStyle::Simple => None,
            HeaderStyle::Structured => Some(option::STRUCTURED_REPLY),
            HeaderStyle::Extended => Some(option::EXTENDED_HEADERS),
        };
        if let Some(agree) = agree {
            assert_eq!(self.ask(agree, &[]).await, [(reply::ACK, vec![])]);
            let names = ["base:allocation", "qemu:dirty-bitmap:x"];
            let told = self.ask(option::SET_META_CONTEXT, &contexts("a", &names)).await;
            assert_eq!(told.len(), 3);
        }
        let told = self.ask(option::GO, &go("a")).await;
        assert_eq!(told.last(), Some(&(reply::ACK, vec![])));
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the server listens");
    }

    pub async fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = tokio::time::timeout(LONG, self.stream.read_exact(&mut bytes)).await;
        read.expect("in time").expect("the server speaks");
        bytes
    }

    /// Sends an option and reads all replies to it.
    pub async fn ask(&mut self, option: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option_bytes(option, payload)).await;
        self.replies(option).await
    }

    pub async fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut told = Vec::new();
        loop {
            let header = self.read(20).await;
            assert_eq!(be64(&header[..8]), wire::OPTION_REPLY);
            assert_eq!(be32(&header[8..12]), option, "a reply to this option");
            let kind = be32(&header[12..16]);
            let len = be32(&header[16..]) as usize;
            assert!(len <= 4096 + 8);
            told.push((kind, self.read(len).await));
            if kind == reply::ACK || kind & reply::ERROR_BIT != 0 {
                return told;
            }
        }
    }

    /// The kind of the only reply to an option.
    pub async fn refusal(&mut self, option: u32, payload: &[u8]) -> u32 {
        let told = self.ask(option, payload).await;
        assert_eq!(told.len(), 1, "{told:?}");
        told[0].0
    }

    pub async fn request(&mut self, style: HeaderStyle, request: Request) {
        let mut bytes = Vec::new();
        request.encode(style, &mut bytes);
        self.send(&bytes).await;
    }

    /// A chunk: flags, kind, cookie, payload.
    pub async fn chunk(&mut self, style: HeaderStyle) -> (u16, u16, u64, Vec<u8>) {
        let extended = style == HeaderStyle::Extended;
        let header = self.read(if extended { 32 } else { 20 }).await;
        let magic = if extended { wire::REPLY_EXTENDED } else { wire::REPLY_STRUCTURED };
        assert_eq!(be32(&header[..4]), magic);
        let len = if extended { be64(&header[24..]) } else { be32(&header[16..]).into() };
        let payload = self.read(usize::try_from(len).unwrap()).await;
        (be16(&header[4..6]), be16(&header[6..8]), be64(&header[8..16]), payload)
    }

    /// The error number of the next chunk, which is the only one of its reply.
    pub async fn errno(&mut self, style: HeaderStyle) -> u32 {
        let (flags, kind, _, payload) = self.chunk(style).await;
        assert_eq!((flags, kind), (wire::chunk::DONE, wire::chunk::ERROR));
        assert_eq!(payload.len(), 6 + usize::from(be16(&payload[4..6])));
        be32(&payload[..4])
    }

    /// Requires that the session works still.
    pub async fn lives(&mut self, style: HeaderStyle) {
        let request = Request { flags: 0, command: 0, cookie: 99, offset: 0, len: 512 };
        self.request(style, request).await;
        let (flags, kind, cookie, payload) = self.chunk(style).await;
        assert_eq!((flags, kind, cookie), (wire::chunk::DONE, wire::chunk::OFFSET_DATA, 99));
        assert_eq!(payload.len(), 8 + 512);
    }

    /// How the session ended; whatever it still said is read and ignored.
    pub async fn end(mut self) -> Result<()> {
        let mut rest = Vec::new();
        let end = async {
            let _ = self.stream.read_to_end(&mut rest).await;
            self.session.await.expect("the session does not panic")
        };
        tokio::time::timeout(LONG, end).await.expect("the session ends by itself")
    }

    /// Requires that the session ended with an error that names this rule.
    pub async fn breaks(self, rule: &'static str) {
        let error = self.end().await.expect_err(rule);
        let text = format!("{error:?}");
        assert!(text.contains(rule) && text.contains("the script"), "{text}");
    }
}

pub fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = option_header(option, u32::try_from(payload.len()).unwrap());
    out.extend(payload);
    out
}

pub fn option_header(option: u32, len: u32) -> Vec<u8> {
    let mut out = wire::IHAVEOPT.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

pub fn string(text: &str) -> Vec<u8> {
    let mut out = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

/// The payload of GO and INFO.
pub fn go(export: &str) -> Vec<u8> {
    [&string(export)[..], &[0, 1, 0, 3]].concat()
}

/// The payload of LIST and SET_META_CONTEXT.
pub fn contexts(export: &str, names: &[&str]) -> Vec<u8> {
    let mut out = string(export);
    out.extend(u32::try_from(names.len()).unwrap().to_be_bytes());
    out.extend(names.iter().flat_map(|name| string(name)));
    out
}
