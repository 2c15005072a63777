//! The server against qemu-img, qemu-io, qemu-nbd's family, libnbd's tools and nbdkit's client.

use std::sync::Arc;

use vmbackup::block::memory::MemoryDisk;
use vmbackup::nbd::server::{Export, Limits};

use crate::rig::{Rig, changed, limits, pattern, try_run};

const LEN: usize = (6 << 20) + 512;

fn read_only(len: usize) -> (Rig, Vec<u8>) {
    let (disk, content) = pattern(len);
    let rig = Rig::new([Export::read_only("vda", disk).described("a disk")]);
    std::fs::write(rig.dir.path().join("expected"), &content).unwrap();
    (rig, content)
}

fn writable(len: usize) -> (Rig, Arc<MemoryDisk>) {
    let disk = Arc::new(MemoryDisk::with_content(vec![0x5a; len]));
    let rig = Rig::new([Export::writable("", Arc::clone(&disk) as _, Arc::clone(&disk) as _)]);
    (rig, disk)
}

fn read(rig: &Rig, file: &str) -> Vec<u8> {
    std::fs::read(rig.dir.path().join(file)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_reads_it_with_extended_headers() {
    let (rig, content) = read_only(LEN);
    rig.run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &rig.text("vda"), "out"]);
    assert!(read(&rig, "out") == content);
    rig.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &rig.text("vda"), "expected"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_sees_holes_as_zero() {
    let rig = Rig::new([Export::read_only("", Arc::new(MemoryDisk::zeroed(1 << 20)))]);
    let map = rig.run("qemu-img", &["map", "-f", "raw", "--output=json", &rig.text("")]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert_eq!(map[0]["length"], 1 << 20);
    assert_eq!((&map[0]["zero"], &map[0]["data"]), (&true.into(), &false.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_writes_it() {
    let (source, content) = read_only(LEN);
    let (rig, disk) = writable(LEN);
    let expected = source.dir.path().join("expected");
    let from = expected.to_str().unwrap();
    rig.run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", from, &rig.text("")]);
    assert!(disk.content() == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_zeroes_trims_and_flushes() {
    let (rig, disk) = writable(1 << 20);
    let uri = rig.text("");
    let io = |command: &str| {
        rig.run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", command, "-c", "flush", &uri])
    };
    io("write -P 7 4096 8192");
    io("write -f -P 8 12345 100");
    io("write -z 65536 4096");
    io("write -z -u 131072 4096");
    io("write -z -u -n 196608 4096");
    // Fast, and with its space: no sink promises both.
    let both = ["-f", "raw", "-c", "write -z -n 327680 4096", &uri];
    let (success, text) = try_run("qemu-io", &both, rig.dir.path());
    assert!(!success && text.contains("Operation not supported"), "{text}");
    io("discard 262144 65536");
    io("read -P 7 4096 8192");
    let content = disk.content();
    assert!(content[4096..12288].iter().all(|byte| *byte == 7));
    assert!(content[12345..12445].iter().all(|byte| *byte == 8));
    for zeroed in [65536..69632, 131_072..135_168, 196_608..200_704] {
        assert!(content[zeroed].iter().all(|byte| *byte == 0));
    }
    for kept in [12288, 327_680] {
        assert_eq!(content[kept], 0x5a, "nothing else changes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_cannot_write_a_read_only_export() {
    let (rig, content) = read_only(65536);
    let args = ["-f", "raw", "-c", "write -P 1 0 512", &rig.text("vda")];
    let (success, text) = try_run("qemu-io", &args, rig.dir.path());
    assert!(!success, "{text}");
    rig.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &rig.text("vda"), "expected"]);
    assert_eq!(content.len(), 65536);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_reads_a_dirty_bitmap_of_it() {
    let disk = changed(1 << 20, &[(65536, 65536)]);
    let rig = Rig::new([Export::read_only("a", Arc::clone(&disk) as _).with_changes("b0", disk)]);
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=a,x-dirty-bitmap=qemu:dirty-bitmap:b0",
        rig.socket().display()
    );
    let map = rig.run("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    // QEMU shows what is dirty as not data (docs/interop/nbd.rst has the reason).
    let dirty: Vec<_> = map.as_array().unwrap().iter().filter(|e| e["data"] == false).collect();
    assert_eq!(dirty.len(), 1, "{map}");
    assert_eq!((&dirty[0]["start"], &dirty[0]["length"]), (&65536.into(), &65536.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_reads_it_over_several_connections() {
    let (rig, content) = read_only(LEN);
    rig.run("nbdcopy", &["--connections=4", "--threads=4", &rig.text("vda"), "out"]);
    assert!(read(&rig, "out") == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_writes_it_over_several_connections() {
    let (source, content) = read_only(LEN);
    let (rig, disk) = writable(LEN);
    let args = ["--connections=4", "--threads=4", "--flush", "expected", &rig.text("")];
    crate::rig::run("nbdcopy", &args, source.dir.path());
    assert!(disk.content() == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_lists_every_export_with_all_it_can() {
    let (disk, _) = pattern(LEN);
    let rig = Rig::new([
        Export::read_only("vda", Arc::clone(&disk) as _).described("the first"),
        Export::writable("vdb", Arc::clone(&disk) as _, Arc::clone(&disk) as _)
            .with_changes("since", disk),
    ]);
    let text = rig.run("nbdinfo", &["--list", "--json", &rig.text("")]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["structured"], true);
    let exports = info["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2, "{text}");
    let [vda, vdb] = [&exports[0], &exports[1]];
    assert_eq!((&vda["export-name"], &vda["description"]), (&"vda".into(), &"the first".into()));
    assert_eq!(vda["export-size"], LEN);
    assert_eq!(vda["is_read_only"], true);
    for ability in ["can_df", "can_cache", "can_multi_conn", "can_flush"] {
        assert_eq!(vda[ability], true, "{ability}: {text}");
    }
    for ability in ["can_zero", "can_fast_zero", "can_trim", "can_fua"] {
        assert_eq!(vdb[ability], true, "{ability}: {text}");
    }
    assert_eq!(vdb["contexts"], serde_json::json!(["base:allocation", "qemu:dirty-bitmap:since"]));
    assert_eq!(vdb["block_size_minimum"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_maps_allocation_and_changes() {
    let rig = Rig::new([Export::read_only("", changed(1 << 20, &[(4096, 8192)]))
        .with_changes("b", changed(1 << 20, &[(4096, 8192)]))]);
    let map = rig.run("nbdinfo", &["--map=qemu:dirty-bitmap:b", "--json", &rig.text("")]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let dirty: Vec<_> = map.as_array().unwrap().iter().filter(|e| e["type"] == 1).collect();
    assert_eq!((&dirty[0]["offset"], &dirty[0]["length"]), (&4096.into(), &8192.into()));
    rig.run("nbdinfo", &["--map", &rig.text("")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_in_front_of_it_passes_everything_through() {
    let (rig, content) = read_only(LEN);
    let socket = format!("socket={}", rig.socket().display());
    for extra in [&[][..], &["shared=1"][..]] {
        let mut args = vec!["-U", "-", "nbd", &socket, "export=vda"];
        args.extend_from_slice(extra);
        args.extend_from_slice(&["--run", "nbdcopy \"$uri\" out"]);
        rig.run("nbdkit", &args);
        assert!(read(&rig, "out") == content);
        std::fs::remove_file(rig.dir.path().join("out")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_storage_daemon_in_front_of_it_passes_everything_through() {
    let (rig, content) = read_only(LEN);
    let ours = format!(
        "driver=nbd,node-name=n,read-only=on,server.type=unix,server.path={},export=vda",
        rig.socket().display()
    );
    // nbdcopy hands it a socket (sd_listen_fds(3)).
    let daemon = ["--", "[", "qemu-storage-daemon", "--blockdev", &ours];
    let export = ["--nbd-server", "addr.type=fd,addr.str=3", "--export"];
    let rest = ["type=nbd,id=e,node-name=n,name=", "]", "out"];
    rig.run("nbdcopy", &[&daemon[..], &export, &rest].concat());
    assert!(read(&rig, "out") == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_reads_it_without_structured_replies() {
    // The kernel's client, and libnbd made to ask for nothing, get simple replies.
    let (rig, content) = read_only(LEN);
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.set_request_structured_replies(False)\nh.connect_uri('{}')\n\
         assert not h.get_structured_replies_negotiated()\n\
         open('out', 'wb').write(b''.join(h.pread(min(1 << 20, h.get_size() - at), at) \
         for at in range(0, h.get_size(), 1 << 20)))",
        rig.text("vda")
    );
    rig.run("/usr/bin/python3", &["-c", &script]);
    assert!(read(&rig, "out") == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_gets_the_documented_errors_for_requests_it_would_not_make() {
    let (rig, _) = read_only(65536);
    let (zeroed, _disk) = writable(65536);
    let script = format!(
        r#"
import errno, nbd
h = nbd.NBD()
def fails(expected, f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == expected, (e.errnum, expected, str(e))
        return
    raise AssertionError("it went through")
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri("{ro}")
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pread, (32 << 20) + 1, 0)
fails(errno.EPERM, h.pwrite, b"x" * 512, 0)
fails(errno.EPERM, h.trim, 512, 0)
fails(errno.EPERM, h.zero, 512, 0)
fails(errno.EINVAL, h.pread, 512, 0, 1 << 6)
fails(errno.EINVAL, h.block_status, 0, 0, lambda *a: 0)
assert h.pread(0, 0) == b""
assert len(h.pread(512, 0)) == 512
h2 = nbd.NBD()
h2.set_strict_mode(0)
h2.connect_uri("{rw}")
fails(errno.ENOSPC, h2.pwrite, b"x" * 512, 65536)
fails(errno.ENOSPC, h2.zero, 512, 65536)
fails(errno.EINVAL, h2.trim, 512, 65536)
fails(errno.EINVAL, h2.block_status, 512, 0, lambda *a: 0)
h2.pwrite(b"", 0)
h2.pwrite(b"y" * 512, 0, nbd.CMD_FLAG_FUA)
assert h2.pread(512, 0) == b"y" * 512
"#,
        ro = rig.text("vda"),
        rw = zeroed.text("")
    );
    rig.run("/usr/bin/python3", &["-c", &script]);
}

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_reads_many_requests_at_once_in_any_order() {
    let (disk, content) = pattern(LEN);
    let limits = Limits { requests: 4, ..limits() };
    let rig = Rig::with_limits([Export::read_only("", disk)], limits);
    rig.run("nbdcopy", &["--requests=256", "--request-size=65536", &rig.text(""), "out"]);
    assert!(read(&rig, "out") == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_finds_what_it_wrote() {
    let (rig, _disk) = writable(8 << 20);
    let uri = format!("--uri={}", rig.text(""));
    let args = ["--name=a", "--ioengine=nbd", &uri, "--rw=randrw", "--bs=4k", "--size=8m"];
    let more =
        ["--iodepth=32", "--verify=crc32c", "--verify_backlog=64", "--io_size=4m", "--thread"];
    rig.run("fio", &[&args[..], &more[..]].concat());
}
