//! The client against qemu-nbd and nbdkit, in the styles they can be made to speak.

use vmbackup::block::{
    BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, ZeroMode, conformance,
};
use vmbackup::error::Kind;
use vmbackup::nbd::wire::HeaderStyle;
use vmbackup::nbd::{Client, ClientOptions, Timeouts, list};

use crate::support::{Server, content_of, pattern_dir, qemu_version, run, tempdir, writing};

const LEN: usize = (6 << 20) + 512;

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_serves_raw_with_the_best_headers_it_has() {
    let (dir, content) = pattern_dir(LEN);
    let server = Server::qemu_nbd(dir, &["-r", "-f", "raw", "-e", "8", "raw"]);
    let client = server.reader().await;
    // Extended headers came with QEMU 8.2 (docs/interop/nbd.txt).
    let extended = qemu_version(server.dir.path()) >= (8, 2);
    let best = if extended { HeaderStyle::Extended } else { HeaderStyle::Structured };
    assert_eq!(client.header_style(), best);
    assert_eq!(client.connection_count(), 2);
    conformance::source(&client, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_with_one_client_gets_one_connection() {
    let (dir, content) = pattern_dir(LEN);
    let server = Server::qemu_nbd(dir, &["-r", "-f", "raw", "raw"]);
    let client = server.reader().await;
    assert_eq!(client.connection_count(), 1);
    conformance::source(&client, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_serves_qcow2_and_zeroes_are_not_data() {
    let (dir, content) = pattern_dir(LEN);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "raw", "a.qcow2"], dir.path());
    let server = Server::qemu_nbd(dir, &["-r", "-f", "qcow2", "-e", "8", "a.qcow2"]);
    conformance::source(&server.reader().await, &content).await;

    let dir = tempdir();
    run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "10G"], dir.path());
    let server = Server::qemu_nbd(dir, &["-r", "-f", "qcow2", "a.qcow2"]);
    let map = conformance::all_extents(&server.reader().await).await;
    assert_eq!(map.bytes_of(ExtentKind::Zero), 10 << 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_takes_writes_over_several_connections() {
    let dir = tempdir();
    run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "6M"], dir.path());
    let server = Server::qemu_nbd(dir, &["-f", "qcow2", "-e", "8", "a.qcow2"]);
    let client = server.writer().await;
    assert_eq!(client.connection_count(), 2);
    let dir = server.dir.path();
    conformance::sink(&client, || async { content_of(dir, "a.qcow2", "qcow2") }).await;
}

/// qemu-storage-daemon with an image of the directory as the default export.
fn storage_daemon(dir: tempfile::TempDir, format: &str, writable: &str) -> Server {
    let file = format!("driver=file,node-name=f,filename={}", dir.path().join("image").display());
    let image = format!("driver={format},node-name=n,file=f");
    let export = format!("type=nbd,id=e,node-name=n,name=,writable={writable}");
    let args = [
        ["--blockdev", &file],
        ["--blockdev", &image],
        ["--nbd-server", &format!("addr.type=unix,addr.path={}", dir.path().join("s").display())],
        ["--export", &export],
    ];
    Server::start(dir, "qemu-storage-daemon", args.as_flattened())
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_storage_daemon_is_read() {
    let (dir, content) = pattern_dir(LEN);
    std::fs::rename(dir.path().join("raw"), dir.path().join("image")).unwrap();
    let server = storage_daemon(dir, "raw", "off");
    conformance::source(&server.reader().await, &content).await;
}

/// Lengths have 32 bits.
#[tokio::test(flavor = "multi_thread")]
async fn one_answer_tells_of_three_gib_whether_they_are_zero() {
    let server = Server::nbdkit(&["null", "8G"]);
    let client = server.writer().await;
    let map = client.existing(ByteRange::new(0, 8 << 30)).await.unwrap();
    assert_eq!(map, ExtentMap::uniform(ByteRange::new(0, 3 << 30), ExtentKind::Zero));
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_storage_daemon_takes_writes() {
    let dir = tempdir();
    run("qemu-img", &["create", "-f", "qcow2", "image", "6M"], dir.path());
    let server = storage_daemon(dir, "qcow2", "on");
    let client = server.writer().await;
    let dir = server.dir.path();
    conformance::sink(&client, || async { content_of(dir, "image", "qcow2") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_ranges_of_a_dirty_bitmap_are_unchanged() {
    for shared in ["1", "8"] {
        let dir = tempdir();
        run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "64M"], dir.path());
        let io =
            |command: &str| run("qemu-io", &["-f", "qcow2", "-c", command, "a.qcow2"], dir.path());
        io("write -P 1 0 32M");
        run("qemu-img", &["bitmap", "--add", "a.qcow2", "b0"], dir.path());
        io("write -P 2 1M 64k");
        io("write -z 2M 128k");
        io("write -P 3 40M 64k");
        let server =
            Server::qemu_nbd(dir, &["-r", "-f", "qcow2", "-e", shared, "-B", "b0", "a.qcow2"]);
        let bitmap = Some("b0".to_owned());
        let client =
            server.open(ClientOptions { changes: bitmap, ..ClientOptions::default() }).await;
        let changed: Vec<_> = conformance::all_extents(&client)
            .await
            .iter()
            .filter(|extent| extent.kind != ExtentKind::Unchanged)
            .map(|extent| (extent.range, extent.kind))
            .collect();
        let expected = [
            (ByteRange::new(1 << 20, 64 << 10), ExtentKind::Data),
            (ByteRange::new(2 << 20, 128 << 10), ExtentKind::Zero),
            (ByteRange::new(40 << 20, 64 << 10), ExtentKind::Data),
        ];
        assert_eq!(changed, expected, "-e {shared}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_that_is_not_exported_is_an_error() {
    let (dir, _) = pattern_dir(LEN);
    let server = Server::qemu_nbd(dir, &["-r", "-f", "raw", "raw"]);
    let options = ClientOptions { changes: Some("b0".to_owned()), ..ClientOptions::default() };
    let error = Client::open_uri(&server.uri(""), options).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("qemu:dirty-bitmap:b0"), "{error}");
}

/// Reads from nbdkit that was made to unlearn something.
async fn reads_nbdkit(unlearn: &[&str], style: HeaderStyle) {
    let (dir, content) = pattern_dir((1 << 20) + 512);
    let file = dir.path().join("raw");
    let args = [unlearn, &["-r", "file", file.to_str().unwrap()]].concat();
    let server = Server::nbdkit(&args);
    let client = server.reader().await;
    assert_eq!(client.header_style(), style);
    conformance::source(&client, &content).await;
}

async fn writes_nbdkit(unlearn: &[&str], style: HeaderStyle) {
    let server = Server::nbdkit(&[unlearn, &["memory", "6M"]].concat());
    let client = server.writer().await;
    assert_eq!(client.header_style(), style);
    let content = || async { vmbackup::block::read_all(&client, 6 << 20).await.unwrap() };
    conformance::sink(&client, content).await;
}

/// One test per cell, named after its claim.
macro_rules! cells {
    ($($name:ident: $does:ident $style:ident [$($unlearn:literal)*];)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            $does(&[$($unlearn),*], HeaderStyle::$style).await;
        }
    )*};
}

cells! {
    nbdkit_is_read_with_all_it_can: reads_nbdkit Structured [];
    nbdkit_without_structured_replies_is_read: reads_nbdkit Simple ["--no-sr"];
    nbdkit_that_is_newstyle_and_not_fixed_is_read: reads_nbdkit Simple ["--mask-handshake=0"];
    nbdkit_that_pads_the_handshake_is_read: reads_nbdkit Structured ["--mask-handshake=1"];
    nbdkit_that_is_not_fixed_and_does_not_pad_is_read: reads_nbdkit Simple ["--mask-handshake=2"];
    nbdkit_that_is_fixed_and_does_not_pad_is_read: reads_nbdkit Structured ["--mask-handshake=3"];
    nbdkit_that_is_oldstyle_is_read: reads_nbdkit Simple ["-o"];
    // Not oldstyle: nbdkit 1.32 advertises WRITE_ZEROES and FLUSH there and then refuses them.
    nbdkit_takes_writes_with_all_it_can: writes_nbdkit Structured [];
    nbdkit_without_structured_replies_takes_writes: writes_nbdkit Simple ["--no-sr"];
    nbdkit_that_is_newstyle_and_not_fixed_takes_writes: writes_nbdkit Simple ["--mask-handshake=0"];
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_cut_to_the_block_sizes_of_the_server() {
    let policy = ["blocksize-minimum=4096", "blocksize-preferred=8192", "blocksize-maximum=64k"];
    let mut args =
        vec!["--filter=blocksize-policy", "memory", "4M", "blocksize-error-policy=error"];
    args.extend(policy);
    let server = Server::nbdkit(&args);
    let client = server.writer().await;
    let geometry = BlockSource::geometry(&client);
    assert_eq!((geometry.align_bytes, geometry.preferred_bytes), (4096, 8192));
    assert_eq!(geometry.request_bytes_max, 64 << 10);
    conformance::sink(&client, || async {
        vmbackup::block::read_all(&client, 4 << 20).await.unwrap()
    })
    .await;
    // A whole megabyte in one call: the client cuts it.
    let buffer = Buffer::unbudgeted(vec![7; 1 << 20]);
    client.write(0, buffer).await.unwrap();
    let buffer = client.read(0, Buffer::unbudgeted(vec![0; 1 << 20])).await.unwrap();
    assert!(buffer.iter().all(|b| *b == 7));
    client.zero(ByteRange::new(0, 4 << 20), ZeroMode::Sparse).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn read_errors_of_the_server_are_errors_and_the_connection_lives_on() {
    for style in [&[][..], &["--no-sr"][..]] {
        let dir = tempdir();
        let trigger = dir.path().join("fail");
        let file = format!("error-file={}", trigger.display());
        let mut args = style.to_vec();
        args.extend(["--filter=error", "pattern", "1M", "error-pread=EIO", "error-rate=1"]);
        args.push(&file);
        let server = Server::nbdkit(&args);
        let client = server.reader().await;
        let read = || client.read(0, Buffer::unbudgeted(vec![0; 4096]));
        read().await.unwrap();
        std::fs::write(&trigger, "").unwrap();
        let error = read().await.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("READ of 4096 bytes at 0"), "{error}");
        std::fs::remove_file(&trigger).unwrap();
        assert_eq!(read().await.unwrap()[8..16], 8_u64.to_be_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_read_leaves_the_connection_usable() {
    let server = Server::nbdkit(&["--filter=delay", "pattern", "1M", "delay-read=100ms"]);
    let client = server.reader().await;
    for offset in 0..20_u64 {
        let read = client.read(offset * 4096, Buffer::unbudgeted(vec![0; 4096]));
        tokio::time::timeout(std::time::Duration::from_millis(5), read).await.unwrap_err();
    }
    let buffer = client.read(512, Buffer::unbudgeted(vec![0; 512])).await.unwrap();
    assert_eq!(buffer[..8], 512_u64.to_be_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_fails_what_is_in_flight() {
    let server = Server::nbdkit(&["--filter=delay", "pattern", "1M", "delay-read=30"]);
    let client = std::sync::Arc::new(server.reader().await);
    let reads: Vec<_> = (0..100)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                client.read(0, Buffer::unbudgeted(vec![0; 512])).await.map(|_| ())
            })
        })
        .collect();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    drop(server);
    for read in reads {
        assert_eq!(read.await.unwrap().unwrap_err().kind(), Kind::Connection);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stalls_is_given_up() {
    let server = Server::nbdkit(&["--filter=delay", "pattern", "1M", "delay-read=60"]);
    let timeouts = Timeouts { stall: std::time::Duration::from_millis(400), ..Timeouts::default() };
    let client = server.open(ClientOptions { timeouts, ..ClientOptions::default() }).await;
    let error = client.read(0, Buffer::unbudgeted(vec![0; 512])).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_export_is_not_opened_for_writing() {
    let server = Server::nbdkit(&["-r", "memory", "1M"]);
    let error = Client::open_uri(&server.uri(""), writing()).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Permission);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_export_is_not_found() {
    let (dir, _) = pattern_dir(LEN);
    let server = Server::qemu_nbd(dir, &["-r", "-f", "raw", "-x", "here", "raw"]);
    let open = Client::open_uri(&server.uri("there"), ClientOptions::default()).await;
    let error = open.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("'there'"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_are_listed_with_their_descriptions() {
    let (dir, _) = pattern_dir(LEN);
    let args = ["-r", "-f", "raw", "-e", "2", "-x", "one", "-D", "the first", "raw"];
    let server = Server::qemu_nbd(dir, &args);
    let exports = list(&server.uri(""), Timeouts::default()).await.unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!((&*exports[0].name, &*exports[0].description), ("one", "the first"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_server_is_a_connection_error_that_names_the_socket() {
    let dir = tempdir();
    let uri = vmbackup::nbd::NbdUri::unix(dir.path().join("nobody"), "");
    let error = Client::open_uri(&uri, ClientOptions::default()).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("nobody"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_must_be_one_piece_is_one_or_refused() {
    use vmbackup::nbd::{Durable, Order};
    let dir = tempdir();
    run("qemu-img", &["create", "-f", "qcow2", "a.qcow2", "6M"], dir.path());
    let server = Server::qemu_nbd(dir, &["-f", "qcow2", "-e", "8", "a.qcow2"]);
    let client = server.writer().await;
    let bytes = Buffer::unbudgeted(vec![7; 65536]);
    client.order(Order::Write(1 << 20, bytes), Durable::Yes).await.unwrap();
    client.order(Order::Cache(ByteRange::new(0, 6 << 20)), Durable::Later).await.unwrap();
    // Half of it a hole: without DF it comes in two chunks.
    let read = client.read_whole((1 << 20) - 32768, Buffer::unbudgeted(vec![1; 65536])).await;
    let read = read.unwrap();
    assert!(read[..32768].iter().all(|b| *b == 0) && read[32768..].iter().all(|b| *b == 7));
    client.order(Order::Trim(ByteRange::new(1 << 20, 65536)), Durable::Yes).await.unwrap();
    let server = Server::nbdkit(&["--no-sr", "memory", "1M"]);
    let error = server.reader().await.read_whole(0, Buffer::unbudgeted(vec![0; 512])).await;
    assert_eq!(error.map(|_| ()).unwrap_err().kind(), Kind::Unsupported);
}
