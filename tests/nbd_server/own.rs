//! Our server and our client: the contracts of sources and sinks hold across the wire.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use vmbackup::block::file::FileSink;
use vmbackup::block::layer::faulty::{Faults, FaultySink, FaultySource};
use vmbackup::block::memory::MemoryDisk;
use vmbackup::block::{
    BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry, ZeroMode,
    conformance,
};
use vmbackup::error::{Error, Kind, Result};
use vmbackup::nbd::server::{Export, Exports, Limits, Listener, Server};
use vmbackup::nbd::wire::HeaderStyle;
use vmbackup::nbd::{Access, Client, ClientOptions, InitialContent, NbdUri, list};

use crate::rig::{Rig, changed, limits, pattern};

const LEN: usize = (6 << 20) + 512;

fn writing() -> ClientOptions {
    ClientOptions { access: Access::Write(InitialContent::Unknown), ..ClientOptions::default() }
}

async fn open(rig: &Rig, export: &str, options: ClientOptions) -> Client {
    Client::open_uri(&rig.uri(export), options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_served_source_is_the_source() {
    let (disk, content) = pattern(LEN);
    let rig = Rig::new([Export::read_only("a", disk)]);
    let client = open(&rig, "a", ClientOptions::default()).await;
    assert_eq!(client.header_style(), HeaderStyle::Extended);
    assert_eq!(client.connection_count(), 2);
    conformance::source(&client, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_served_sink_is_the_sink() {
    let disk = Arc::new(MemoryDisk::zeroed(LEN));
    let rig = Rig::new([Export::writable("", Arc::clone(&disk) as _, Arc::clone(&disk) as _)]);
    let client = open(&rig, "", writing()).await;
    conformance::sink(&client, || async { disk.content() }).await;
    client.zero(ByteRange::new(0, LEN as u64), ZeroMode::FastOnly).await.unwrap();
    assert!(disk.content().iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_smaller_than_a_request_slows_and_does_not_stop() {
    let (disk, content) = pattern(LEN);
    let limits = Limits { connection_bytes: 4096, requests: 2, ..limits() };
    let rig = Rig::with_limits([Export::read_only("", disk)], limits);
    let client = open(&rig, "", ClientOptions::default()).await;
    conformance::source(&client, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_answer_tells_that_a_large_disk_is_zero() {
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("empty.raw");
    let size_bytes = 100_u64 << 30;
    std::fs::File::create(&path).unwrap().set_len(size_bytes).unwrap();
    let sink = Arc::new(FileSink::open_any(&path).unwrap());
    let rig = Rig::new([Export::writable("", Arc::new(sink.reader().unwrap()), sink)]);
    let whole = ByteRange::new(0, size_bytes);
    let map = open(&rig, "", writing()).await.existing(whole).await.unwrap();
    assert_eq!(map, ExtentMap::uniform(whole, ExtentKind::Zero));
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_a_dirty_bitmap() {
    let disk = changed(LEN, &[(65536, 4096), (1 << 20, 65536)]);
    let rig = Rig::new([Export::read_only("", Arc::clone(&disk) as _).with_changes("since", disk)]);
    let options = ClientOptions { changes: Some("since".into()), ..ClientOptions::default() };
    let map = conformance::all_extents(&open(&rig, "", options).await).await;
    assert_eq!(map.bytes_of(ExtentKind::Data), 4096 + 65536);
    assert_eq!(map.bytes_of(ExtentKind::Unchanged), LEN as u64 - 4096 - 65536);
}

/// A disk that does not say what it holds.
struct Silent(Arc<MemoryDisk>);

#[async_trait::async_trait]
impl BlockSource for Silent {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&*self.0)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        Err(Error::new(Kind::Io, format!("asked what {range} holds")))
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.0.read(offset, buffer).await
    }
}

/// On one connection, where one query would be about both contexts (BLOCK_STATUS_PAYLOAD).
#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_changed_the_allocation_is_not_asked_for() {
    let disk = Arc::new(Silent(Arc::new(MemoryDisk::zeroed(LEN))));
    let rig = Rig::new([Export::read_only("", disk).with_changes("since", changed(LEN, &[]))]);
    let options =
        ClientOptions { changes: Some("since".into()), connections: 1, ..ClientOptions::default() };
    let map = conformance::all_extents(&open(&rig, "", options).await).await;
    assert_eq!(map.bytes_of(ExtentKind::Unchanged), LEN as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_are_listed_with_descriptions_and_an_unknown_one_is_not_found() {
    let (disk, _) = pattern(4096);
    let rig = Rig::new([
        Export::read_only("vda", Arc::clone(&disk) as _).described("the first"),
        Export::read_only("vdb", disk),
    ]);
    let exports = list(&rig.uri(""), ClientOptions::default().timeouts).await.unwrap();
    let told: Vec<_> = exports.iter().map(|e| (&*e.name, &*e.description)).collect();
    assert_eq!(told, [("vda", "the first"), ("vdb", "")]);
    for name in ["vdc", ""] {
        let error = Client::open_uri(&rig.uri(name), ClientOptions::default()).await;
        assert_eq!(error.map(|_| ()).unwrap_err().kind(), Kind::NotFound, "'{name}'");
    }
    let client = open(&rig, "vda", ClientOptions::default()).await;
    assert_eq!(client.export().description.as_deref(), Some("the first"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_export_is_the_default_one() {
    let (disk, content) = pattern(65536);
    let rig = Rig::new([Export::read_only("vda", disk)]);
    let client = open(&rig, "", ClientOptions::default()).await;
    assert_eq!(client.export().name.as_deref(), Some("vda"));
    conformance::source(&client, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_disk_is_an_error_at_the_client_and_never_data() {
    let (disk, content) = pattern(65536);
    let faults = Faults { read_at: Some(8192), flush: true, ..Faults::default() };
    let source = FaultySource::new(Arc::clone(&disk) as _, faults);
    let sink = FaultySink::new(disk, faults);
    let rig = Rig::new([Export::writable("", Arc::new(source), Arc::new(sink))]);
    let client = open(&rig, "", writing()).await;
    let error = client.read(4096, Buffer::unbudgeted(vec![0; 8192])).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Io, "{error:?}");
    assert!(error.to_string().contains("on purpose"), "{error}");
    let buffer = client.read(0, Buffer::unbudgeted(vec![0; 4096])).await.unwrap();
    assert_eq!(buffer[..], content[..4096], "the connection goes on");
    assert_eq!(client.flush().await.unwrap_err().kind(), Kind::Io, "data may be lost: say so");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_is_used_where_more_are_not_offered() {
    let (disk, _) = pattern(65536);
    let rig = Rig::new([Export::read_only("", disk).one_connection()]);
    assert_eq!(open(&rig, "", ClientOptions::default()).await.connection_count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_finishes_what_is_in_progress_and_then_closes() {
    let (disk, content) = pattern(65536);
    let faults = Faults { delay: Duration::from_secs(2), ..Faults::default() };
    let mut rig = Rig::new([Export::read_only("", Arc::new(FaultySource::new(disk, faults)))]);
    let client = open(&rig, "", ClientOptions::default()).await;
    let read = client.read(0, Buffer::unbudgeted(vec![0; 65536]));
    let (buffer, ()) = tokio::join!(read, async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        rig.stop().await;
    });
    assert!(buffer.unwrap()[..] == content[..]);
    assert!(!rig.socket().exists(), "the socket goes with the server");
    let error = client.read(0, Buffer::unbudgeted(vec![0; 512])).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Connection, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_beyond_the_limit_waits_a_moment_for_its_turn() {
    let (disk, _) = pattern(65536);
    let rig =
        Rig::with_limits([Export::read_only("", disk)], Limits { connections: 1, ..limits() });
    let first = open(&rig, "", ClientOptions::default()).await;
    assert_eq!(first.connection_count(), 1);
    let uri = rig.uri("");
    let mut second =
        tokio::spawn(async move { Client::open_uri(&uri, ClientOptions::default()).await });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut second).await;
    assert!(early.is_err(), "there is one place");
    drop(first);
    second.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let (disk, _) = pattern(4096);
    let rig = Rig::new([Export::read_only("", disk)]);
    let busy = Listener::unix(&rig.socket()).unwrap_err();
    assert_eq!(busy.kind(), Kind::Busy, "{busy:?}");
    let stale = rig.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let listener = Listener::unix(&stale).unwrap();
    let mode = std::fs::symlink_metadata(&stale).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(listener);
    assert!(!stale.exists());
    std::fs::write(&stale, "a file").unwrap();
    let error = Listener::unix(&stale).unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_is_told_what_an_export_holds_and_others_are_not() {
    use vmbackup::nbd::InitialState::{Dense, Sparse, Zero};
    let disk = |content: Vec<u8>| Arc::new(MemoryDisk::with_content(content));
    let zero = Arc::new(MemoryDisk::zeroed(1 << 20));
    let mut half = vec![1; 1 << 20];
    half[..1 << 19].fill(0);
    let (sparse, dense) = (disk(half), disk(vec![1; 1 << 20]));
    let rig = Rig::new([
        Export::writable("zero", Arc::clone(&zero) as _, Arc::clone(&zero) as _),
        Export::writable("sparse", Arc::clone(&sparse) as _, sparse as _),
        Export::writable("dense", Arc::clone(&dense) as _, dense as _),
    ]);
    for (name, state) in [("zero", Zero), ("sparse", Sparse), ("dense", Dense)] {
        let client = open(&rig, name, writing()).await;
        assert_eq!(client.initial_state(), Some(state));
        assert_eq!(client.starts_zero(), state == Zero);
        assert_eq!(open(&rig, name, ClientOptions::default()).await.initial_state(), None);
    }
    let client = open(&rig, "zero", writing()).await;
    client.write(4096, Buffer::unbudgeted(vec![1; 512])).await.unwrap();
    assert!(!open(&rig, "zero", writing()).await.starts_zero(), "it was then, not now");
    let listed = rig.run("nbdinfo", &[&rig.text("sparse")]);
    assert!(listed.contains("base:allocation") && !listed.contains("vmbackup:"), "{listed}");
}

/// Whether a timer of the kernel watches both ends of the connections to `port` (proc(5),
/// /proc/net/tcp: the timer 2 is the keepalive's).
fn both_ends_are_kept_alive(port: u16) -> bool {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let ends: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    let port = format!(":{port:04X}");
    // Established, from or to this port.
    let of_port =
        |end: &&Vec<&str>| end[3] == "01" && (end[1].ends_with(&port) || end[2].ends_with(&port));
    let ends: Vec<_> = ends.iter().filter(of_port).collect();
    assert!(ends.len() >= 2, "{table}");
    ends.iter().all(|end| end[5].starts_with("02:"))
}

/// A host that vanishes says nothing: without this its connection keeps its place for ever.
#[tokio::test(flavor = "multi_thread")]
async fn tcp_connections_are_probed_from_both_ends_while_nothing_is_said() {
    let (disk, _) = pattern(65536);
    let server = Server::new(Exports::new([Export::read_only("", disk)]).unwrap(), limits());
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let port = listener.tcp_address().unwrap().port();
    let listening = server.clone();
    tokio::spawn(async move { listening.listen(listener).await });
    let uri: NbdUri = format!("nbd://127.0.0.1:{port}").parse().unwrap();
    let client = Client::open_uri(&uri, ClientOptions::default()).await.unwrap();
    client.read(0, Buffer::unbudgeted(vec![0; 512])).await.unwrap();
    // Until all that was said is acknowledged another timer may run.
    let watched = async {
        while !both_ends_are_kept_alive(port) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), watched).await.expect("both ends are probed");
    server.stop();
}

/// The kernel's NBD client took sockets of any type from whoever may give it one. We have no part in it
/// (nothing of ours uses nbd.ko); what is handed to our server is looked at for the same reason.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_40080_what_is_handed_over_and_does_not_listen_for_streams_is_refused() {
    let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for socket in [connected.into(), datagrams.into(), udp.into()] {
        let error = Listener::inherited(socket).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        assert!(error.to_string().contains("not one that listens for streams"), "{error}");
    }
    let file = tempfile::tempfile().unwrap();
    Listener::inherited(file.into()).unwrap_err();
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    Listener::inherited(listening.into()).unwrap();
}
