//! Somebody between client and server who writes, withholds and repeats what he likes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use vmbackup::error::{Error, Kind, Result};
use vmbackup::nbd::server::{Limits, Server};
use vmbackup::nbd::tls::{ClientCertificates, ClientTls, Credentials, Mode, Secured, ServerTls};
use vmbackup::nbd::wire::{self, be32, be64, command, errno, option, reply};
use vmbackup::nbd::{Client, ClientOptions, Connector, Stream};

use crate::pki::{Pki, SERVER_NAME};
use crate::server::{EXPORT, exports, options};

/// Patience where nothing should need it.
const LONG: Duration = Duration::from_secs(20);

type Script = dyn Fn(DuplexStream) -> JoinHandle<Vec<u8>> + Send + Sync;

/// A way to a script, which returns what it heard.
struct Way {
    tls: ClientTls,
    script: Box<Script>,
    heard: std::sync::Mutex<Vec<JoinHandle<Vec<u8>>>>,
}

impl Way {
    fn new<F: Future<Output = Vec<u8>> + Send + 'static>(
        tls: ClientTls,
        script: impl Fn(DuplexStream) -> F + Send + Sync + 'static,
    ) -> Self {
        let script = Box::new(move |stream| tokio::spawn(script(stream)));
        Self { tls, script, heard: std::sync::Mutex::default() }
    }

    async fn open(&self) -> Result<Client> {
        let open = Client::open(self, EXPORT, ClientOptions::default());
        tokio::time::timeout(LONG, open).await.expect("the client ends by itself")
    }

    /// Requires an error, and that the export's name was not heard.
    async fn refuses(&self) -> Error {
        let error = self.open().await.map(|_| ()).expect_err("it was attacked");
        let heard = std::mem::take(&mut *self.heard.lock().unwrap());
        for heard in heard {
            let heard = tokio::time::timeout(LONG, heard).await.unwrap().unwrap();
            let name = EXPORT.as_bytes();
            assert!(!heard.windows(name.len()).any(|w| w == name), "the name in plain text");
        }
        error
    }
}

#[async_trait]
impl Connector for Way {
    fn peer(&self) -> Arc<str> {
        "the script".into()
    }

    async fn connect(&self) -> Result<Box<dyn Stream>> {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        self.heard.lock().unwrap().push((self.script)(theirs));
        Ok(Box::new(ours))
    }

    fn tls(&self) -> Option<&ClientTls> {
        Some(&self.tls)
    }

    fn host(&self) -> Option<&str> {
        Some(SERVER_NAME)
    }
}

fn client_tls(pki: &Pki, mode: Mode) -> ClientTls {
    ClientTls { mode, ..ClientTls::required(Credentials::Certificates(pki.client())) }
}

fn server_tls(pki: &Pki, mode: Mode) -> ServerTls {
    let credentials = Credentials::Certificates(pki.server());
    ServerTls::load(&options(mode, credentials, ClientCertificates::Optional)).unwrap()
}

fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::OPTION_REPLY.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend(payload);
    out
}

fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::IHAVEOPT.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend(payload);
    out
}

/// A payload of GO and INFO, or the beginning of one that sets contexts.
fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out.extend(rest);
    out
}

/// Greets, hears flags and an option, says `answer`, and hears what comes until the end.
async fn greet_and_say(mut stream: DuplexStream, answer: Vec<u8>) -> Vec<u8> {
    let mut greeting = wire::GREETING.to_be_bytes().to_vec();
    greeting.extend(wire::IHAVEOPT.to_be_bytes());
    greeting.extend([0, 3]);
    stream.write_all(&greeting).await.unwrap();
    let mut heard = vec![0; 20];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(be32(&heard[12..16]), option::STARTTLS, "the first thing a client says");
    let _ = stream.write_all(&answer).await;
    let _ = stream.read_to_end(&mut heard).await;
    heard
}

/// What an attacker would like a client to believe of the server.
fn lies() -> Vec<u8> {
    let mut export = vec![0, 0];
    export.extend((1_u64 << 20).to_be_bytes());
    export.extend([0, 1]);
    [
        option_reply(option::EXTENDED_HEADERS, reply::ACK, &[]),
        option_reply(option::GO, reply::INFO, &export),
        option_reply(option::GO, reply::ACK, &[]),
    ]
    .concat()
}

/// CVE-2021-3716 from the other side: plain text behind the answer to STARTTLS.
#[tokio::test]
async fn replies_injected_behind_the_answer_to_starttls_end_the_session() {
    let pki = Pki::new();
    for mode in [Mode::Required, Mode::Allowed] {
        let way = Way::new(client_tls(&pki, mode), |stream| {
            let ack = option_reply(option::STARTTLS, reply::ACK, &[]);
            greet_and_say(stream, [ack, lies()].concat())
        });
        let error = way.refuses().await;
        assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
        assert!(error.to_string().contains("TLS handshake"), "{error}");
    }
}

#[tokio::test]
async fn replies_injected_before_the_answer_to_starttls_end_the_session() {
    let pki = Pki::new();
    for mode in [Mode::Required, Mode::Allowed] {
        let way = Way::new(client_tls(&pki, mode), |stream| {
            let ack = option_reply(option::STARTTLS, reply::ACK, &[]);
            greet_and_say(stream, [lies(), ack].concat())
        });
        let error = way.refuses().await;
        assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
        assert!(error.to_string().contains("reply to option"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_agrees_to_tls_and_then_has_none_is_not_spoken_to_without() {
    let pki = Pki::new();
    let ack = || option_reply(option::STARTTLS, reply::ACK, &[]);
    for answer in [
        [ack(), b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()].concat(),
        // A fatal alert: handshake_failure.
        [ack(), vec![0x15, 3, 3, 0, 2, 2, 40]].concat(),
        option_reply(option::STARTTLS, reply::ACK, b"surplus"),
        option_reply(option::STARTTLS, reply::INFO, &[]),
    ] {
        let way = Way::new(client_tls(&pki, Mode::Allowed), move |stream| {
            greet_and_say(stream, answer.clone())
        });
        way.refuses().await;
    }
}

#[tokio::test]
async fn every_refusal_of_starttls_ends_a_session_that_requires_it() {
    let pki = Pki::new();
    for kind in [reply::UNSUP, reply::POLICY, reply::INVALID, reply::PLATFORM, reply::TLS_REQD] {
        let way = Way::new(client_tls(&pki, Mode::Required), move |stream| {
            greet_and_say(stream, [option_reply(option::STARTTLS, kind, b"no"), lies()].concat())
        });
        assert_eq!(way.refuses().await.kind(), Kind::Unsupported);
    }
}

#[tokio::test]
async fn tls_on_the_first_of_two_connections_only_is_refused() {
    let pki = Pki::new();
    let secure =
        Server::with_tls(exports(), Limits::default(), Some(server_tls(&pki, Mode::Required)));
    let plain = Server::new(exports(), Limits::default());
    let count = Arc::new(AtomicUsize::new(0));
    let way = Way::new(client_tls(&pki, Mode::Allowed), move |stream| {
        let first = count.fetch_add(1, Ordering::Relaxed) == 0;
        let server = if first { secure.clone() } else { plain.clone() };
        async move {
            let _ = server.session(Box::new(stream), "the client").await;
            Vec::new()
        }
    });
    let error = way.open().await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
}

/// A client that says what it likes.
struct Raw<S> {
    stream: S,
    session: JoinHandle<Result<()>>,
}

async fn raw(pki: &Pki, mode: Mode, limits: Limits) -> Raw<DuplexStream> {
    let server = Server::with_tls(exports(), limits, Some(server_tls(pki, mode)));
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let session = tokio::spawn(async move { server.session(Box::new(theirs), "the script").await });
    let mut raw = Raw { stream: ours, session };
    raw.read(18).await;
    raw.stream.write_all(&3_u32.to_be_bytes()).await.unwrap();
    raw
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Raw<S> {
    async fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = tokio::time::timeout(LONG, self.stream.read_exact(&mut bytes)).await;
        read.expect("in time").expect("the server speaks");
        bytes
    }

    /// The kinds of the replies to an option.
    async fn ask(&mut self, option: u32, payload: &[u8]) -> Vec<u32> {
        self.stream.write_all(&option_bytes(option, payload)).await.unwrap();
        self.stream.flush().await.unwrap();
        let mut kinds = Vec::new();
        loop {
            let header = self.read(20).await;
            assert_eq!((be64(&header[..8]), be32(&header[8..12])), (wire::OPTION_REPLY, option));
            self.read(be32(&header[16..]) as usize).await;
            let kind = be32(&header[12..16]);
            kinds.push(kind);
            if kind == reply::ACK || kind & reply::ERROR_BIT != 0 {
                return kinds;
            }
        }
    }

    async fn end(mut self) -> Result<()> {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(LONG, self.stream.read_to_end(&mut rest)).await.unwrap();
        tokio::time::timeout(LONG, self.session).await.unwrap().unwrap()
    }
}

impl Raw<DuplexStream> {
    async fn start_tls(mut self, pki: &Pki) -> Raw<Box<dyn Stream>> {
        assert_eq!(self.ask(option::STARTTLS, &[]).await, [reply::ACK]);
        let tls = client_tls(pki, Mode::Required);
        let Secured { stream, .. } =
            tls.connect(Box::new(self.stream), "the server", Some(SERVER_NAME)).await.unwrap();
        Raw { stream, session: self.session }
    }
}

/// CVE-2021-3716 (nbdkit): what was agreed in plain text survived STARTTLS.
#[tokio::test]
async fn cve_2021_3716_what_was_agreed_before_tls_is_forgotten() {
    let pki = Pki::new();
    let mut raw = raw(&pki, Mode::Allowed, Limits::default()).await;
    assert_eq!(raw.ask(option::STRUCTURED_REPLY, &[]).await, [reply::ACK]);
    let contexts = named("", &[&[0, 0, 0, 1][..], &named("base:allocation", &[])].concat());
    let told = raw.ask(option::SET_META_CONTEXT, &contexts).await;
    assert_eq!(told, [reply::META_CONTEXT, reply::ACK]);

    let mut raw = raw.start_tls(&pki).await;
    assert_eq!(raw.ask(option::GO, &named("", &[0, 0])).await.last(), Some(&reply::ACK));
    for (number, expected) in [(command::READ, 0), (command::BLOCK_STATUS, errno::EINVAL)] {
        let header = wire::Request { flags: 0, command: number, cookie: 1, offset: 0, len: 512 };
        let mut bytes = Vec::new();
        header.encode(wire::HeaderStyle::Simple, &mut bytes);
        raw.stream.write_all(&bytes).await.unwrap();
        raw.stream.flush().await.unwrap();
        let header = raw.read(16).await;
        assert_eq!(be32(&header[..4]), wire::REPLY_SIMPLE, "structured replies are forgotten");
        assert_eq!(be32(&header[4..8]), expected);
        if expected == 0 {
            raw.read(512).await;
        }
    }
}

#[tokio::test]
async fn options_injected_behind_starttls_end_the_session() {
    let pki = Pki::new();
    let mut raw = raw(&pki, Mode::Allowed, Limits::default()).await;
    let options = [
        option_bytes(option::STARTTLS, &[]),
        option_bytes(option::STRUCTURED_REPLY, &[]),
        option_bytes(option::GO, &named("", &[0, 0])),
    ];
    raw.stream.write_all(&options.concat()).await.unwrap();
    assert_eq!(raw.read(20).await, option_reply(option::STARTTLS, reply::ACK, &[]));
    let error = raw.end().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
    assert!(error.to_string().contains("the script"), "{error}");
}

#[tokio::test]
async fn a_server_that_requires_tls_tells_nothing_before_it() {
    let pki = Pki::new();
    let mut raw = raw(&pki, Mode::Required, Limits::default()).await;
    for number in (3..=12).filter(|n| *n != option::STARTTLS).chain([99]) {
        assert_eq!(raw.ask(number, &named("", &[0, 0])).await, [reply::TLS_REQD], "{number}");
    }
    assert_eq!(raw.ask(option::STARTTLS, b"x").await, [reply::INVALID]);
    let mut raw = raw.start_tls(&pki).await;
    assert_eq!(raw.ask(option::STARTTLS, &[]).await, [reply::INVALID], "once is enough");
    assert_eq!(raw.ask(option::LIST, &[]).await, [reply::SERVER, reply::ACK]);
    assert_eq!(raw.ask(option::ABORT, &[]).await, [reply::ACK]);
    raw.end().await.unwrap();
}

#[tokio::test]
async fn export_name_before_tls_ends_the_session_where_tls_is_required() {
    let pki = Pki::new();
    let mut raw = raw(&pki, Mode::Required, Limits::default()).await;
    raw.stream.write_all(&option_bytes(option::EXPORT_NAME, b"")).await.unwrap();
    assert_eq!(raw.end().await.unwrap_err().kind(), Kind::Protocol);
}

#[tokio::test]
async fn a_client_that_stalls_in_the_tls_handshake_is_cut_off() {
    let pki = Pki::new();
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let mut raw = raw(&pki, Mode::Required, limits).await;
    assert_eq!(raw.ask(option::STARTTLS, &[]).await, [reply::ACK]);
    raw.stream.write_all(&[0x16, 3, 1]).await.unwrap();
    assert_eq!(raw.end().await.unwrap_err().kind(), Kind::Timeout);
}
