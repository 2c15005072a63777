//! `vmbackup nbd …` against our own server and qemu-nbd.

use crate::rig::{DISK_BYTES, Serve, content, env_with_point};
use crate::support::{NbdServer, Process, TestEnv, is_listening, wait_until};

#[test]
fn info_and_list_tell_what_a_server_of_ours_offers() {
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point, "disk.raw"]);
    let report = env.vmbackup(&["nbd", "list", &serve.uri(0), "--json"]).json();
    assert_eq!(report["headers"], "extended");
    let exports = report["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2, "{report}");
    assert_eq!(exports[1]["name"], "disk.raw");
    assert_eq!(exports[0]["size_bytes"], DISK_BYTES);
    let report = env.vmbackup(&["nbd", "info", &serve.uri(0), "--json"]).json();
    let export = &report["exports"][0];
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "qemu:allocation-depth"]));
    let flags: Vec<_> = export["flags"].as_array().unwrap().iter().collect();
    assert!(flags.contains(&&"read-only".into()) && flags.contains(&&"multi-conn".into()));
    let text = env.vmbackup(&["nbd", "info", &serve.uri(0), "--all"]).ok().stdout;
    assert!(text.contains("'disk.raw'") && text.contains("base:allocation"), "{text}");
    assert_eq!(env.vmbackup(&["nbd", "info", "nbd+unix:///x?socket=nowhere"]).code, Some(13));
}

#[test]
fn info_tells_how_sessions_begin_and_what_is_in_an_export_only_if_asked() {
    let env = TestEnv::new();
    for (arg, handshake) in [
        ("--oldstyle", "oldstyle"),
        ("--mask-handshake=0", "newstyle"),
        ("--newstyle", "fixed-newstyle"),
    ] {
        let server = NbdServer::nbdkit(&env, &[arg, "memory", "1M"]);
        let report = env.vmbackup(&["nbd", "info", &server.uri(""), "--json"]).json();
        assert_eq!(report["handshake"], handshake, "{report}");
        assert!(report["tls"].is_null(), "{report}");
        assert!(report["exports"][0]["content"].is_null(), "{report}");
        let text = env.vmbackup(&["nbd", "info", &server.uri("")]).ok().stdout;
        let line = format!("handshake    {}\n", handshake.replace('-', " "));
        assert!(text.contains(&line) && !text.contains("content"), "{text}");
    }
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", "d.qcow2", "1M"]).ok();
    std::fs::write(env.path("fs"), vec![0; 4 << 20]).unwrap();
    env.run("mkfs.ext4", &["-q", "fs"]).ok();
    std::fs::write(env.path("odd"), b"QFI").unwrap();
    std::fs::write(env.path("empty"), b"").unwrap();
    for (file, content) in [
        ("d.qcow2", "QEMU qcow image"),
        ("fs", "ext2, ext3 or ext4 file system"),
        ("odd", "data"),
        ("empty", "nothing"),
    ] {
        let log = env.path(&format!("{file}.log"));
        let logfile = format!("logfile={}", log.display());
        let server = NbdServer::nbdkit(&env, &["--filter=log", "file", file, &logfile]);
        env.vmbackup(&["nbd", "info", &server.uri("")]).ok();
        let told = std::fs::read_to_string(&log).unwrap();
        assert!(told.contains("Connect") && !told.contains("Read id="), "{told}");
        let report = env.vmbackup(&["nbd", "info", &server.uri(""), "--content", "--json"]).json();
        assert_eq!(report["exports"][0]["content"], content, "{report}");
        let text = env.vmbackup(&["nbd", "info", &server.uri(""), "--content"]).ok().stdout;
        assert!(text.contains(&format!("content      {content}")), "{text}");
    }
}

/// nbdkit with three exports, described in its list, one of which cannot be opened.
fn three_exports(env: &TestEnv) -> NbdServer {
    let list = "printf 'INTERLEAVED\\none\\nthe first\\ntwo\\nthe second\\nthree\\nthe third\\n'";
    let list = format!("list_exports={list}");
    let open = "open=if [ \"$3\" = two ]; then echo 'EIO its disk is gone' >&2; exit 1; fi";
    NbdServer::nbdkit(env, &["eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", &list, open])
}

#[test]
fn the_list_shows_descriptions_and_an_export_that_fails_among_the_others() {
    let env = TestEnv::new();
    let server = three_exports(&env);
    let uri = server.uri("");
    for command in [&["list"][..], &["info", "--all"]] {
        let args = [&["nbd"], command, &[&uri]].concat();
        let outcome = env.vmbackup(&args).fails_with(&["1 of 3 exports cannot be looked at"]);
        for text in ["'one'", "the first", "'two'", "the second", "'three'", "the third"] {
            assert!(outcome.stdout.contains(text), "{command:?} without {text}: {outcome:?}");
        }
        let outcome = env.vmbackup(&[&args[..], &["--json"]].concat()).fails();
        let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        let exports = report["exports"].as_array().unwrap();
        assert_eq!(exports.len(), 2, "{report}");
        assert_eq!(exports[1]["description"], "the third", "{report}");
        assert_eq!(report["failed"][0]["name"], "two");
        assert_eq!(report["failed"][0]["description"], "the second");
        assert!(report["failed"][0]["error"].as_str().unwrap().contains("'two'"), "{report}");
    }
}

#[test]
fn a_context_that_is_named_twice_is_mapped_once() {
    let env = TestEnv::new();
    let server = NbdServer::nbdkit(&env, &["memory", "1M"]);
    let (uri, context) = (server.uri(""), ["--context", "base:allocation"]);
    let args = [&["nbd", "map", &uri, "--json"][..], &context, &context].concat();
    assert_eq!(env.vmbackup(&args).json()["contexts"].as_array().unwrap().len(), 1);
}

#[test]
fn a_map_of_all_contexts_needs_one_connection() {
    let env = TestEnv::new();
    env.run("qemu-img", &["create", "-f", "qcow2", "d.qcow2", "64M"]).ok();
    env.run("qemu-img", &["bitmap", "--add", "d.qcow2", "b0"]).ok();
    let socket = env.path("one");
    // Without -t it ends with its first client.
    let mut command = env.command("qemu-nbd");
    command.args(["-r", "-f", "qcow2", "-B", "b0", "-A", "-k"]).arg(&socket).arg("d.qcow2");
    let _server = Process::spawn(&mut command);
    wait_until("the socket", 20, || is_listening(&socket));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let report = env.vmbackup(&["nbd", "map", &uri, "--json"]).ok().json();
    let names = report["contexts"].as_array().unwrap().iter().map(|context| &context["name"]);
    let expected = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"];
    assert!(names.eq(expected.iter()), "{report}");
}

#[test]
fn a_map_shows_every_context_and_its_totals() {
    let env = TestEnv::new();
    env.run("qemu-img", &["create", "-f", "qcow2", "d.qcow2", "64M"]).ok();
    env.run("qemu-img", &["bitmap", "--add", "d.qcow2", "b0"]).ok();
    env.run("qemu-io", &["-f", "qcow2", "-c", "write 1M 64k", "d.qcow2"]).ok();
    let server =
        NbdServer::qemu_nbd(&env, &env.path("d.qcow2"), &["-f", "qcow2", "-B", "b0", "-A"]);
    let uri = server.uri("");
    let report = env.vmbackup(&["nbd", "map", &uri, "--json"]).json();
    let context = |name: &str| {
        let all = report["contexts"].as_array().unwrap();
        all.iter().find(|context| context["name"] == name).unwrap_or_else(|| panic!("{report}"))
    };
    for (name, there, elsewhere) in [
        ("base:allocation", "data", "hole,zero"),
        ("qemu:dirty-bitmap:b0", "dirty", "clean"),
        ("qemu:allocation-depth", "local", "unallocated"),
    ] {
        let extents = context(name)["extents"].as_array().unwrap();
        assert_eq!(extents.len(), 3, "{name}: {extents:?}");
        assert_eq!(extents[1]["state"], there);
        assert_eq!(
            (&extents[1]["offset"], &extents[1]["bytes"]),
            (&(1 << 20).into(), &65536.into())
        );
        let totals = context(name)["totals"].as_array().unwrap();
        let rest = totals.iter().find(|total| total["state"] == elsewhere).unwrap();
        assert_eq!(rest["bytes"], (64 << 20) - 65536);
    }
    let args = ["nbd", "map", &uri, "--offset", "1052672", "--json"];
    let report = env.vmbackup(&args).ok().json();
    for context in report["contexts"].as_array().unwrap() {
        let extents = context["extents"].as_array().unwrap();
        assert_eq!(extents.len(), 1, "{context}");
        // The extent of 64 KiB at 1 MiB, from its second 4 KiB on.
        assert_eq!(
            (&extents[0]["offset"], &extents[0]["bytes"]),
            (&1_052_672.into(), &61_440.into())
        );
    }
    let args = ["nbd", "map", &uri, "--offset", "64M"];
    assert_eq!(env.vmbackup(&args).code, Some(2));
    let args = ["nbd", "map", &uri, "--totals", "--context", "qemu:dirty-bitmap:b0"];
    let text = env.vmbackup(&args).ok().stdout;
    assert!(text.contains("dirty") && text.contains("0.0 %") && text.contains("99.9 %"), "{text}");
    let args = ["nbd", "map", &uri, "--context", "qemu:dirty-bitmap:none"];
    assert_eq!(env.vmbackup(&args).code, Some(3));
}

#[test]
fn read_shows_the_bytes_that_are_there() {
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let serve = Serve::start(&env, &["disk.raw"]);
    let args = ["nbd", "read", &serve.uri(0), "--offset", "1000", "--length", "40", "--json"];
    let report = env.vmbackup(&args).json();
    let hex = report["data"].as_str().unwrap();
    assert_eq!(hex.len(), 80);
    for (digits, byte) in hex.as_bytes().chunks(2).zip(&content(1)[1000..1040]) {
        assert_eq!(digits, format!("{byte:02x}").as_bytes());
    }
    let text = env.vmbackup(&["nbd", "read", &serve.uri(0), "--offset", "1M"]).ok().stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "repeated lines are left out: {text}");
    assert!(lines[0].starts_with("0000100000  00 00 ") && lines[1] == "*", "{text}");
    assert_eq!(lines[2], "0000100200");
}

#[test]
fn nothing_is_read_and_trimmed_at_the_end_of_a_disk_of_odd_size() {
    let env = TestEnv::new();
    std::fs::write(env.path("odd.raw"), vec![7; 1_000_000]).unwrap();
    // Blocks in which the disk does not end.
    let blocks = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=1M"];
    let args = [&["--filter=blocksize-policy", "file", "odd.raw"], &blocks[..]].concat();
    let server = NbdServer::nbdkit(&env, &args);
    let (uri, end) = (server.uri(""), ["--offset", "1000000"]);
    let args = [&["nbd", "read", &uri, "--json"], &end[..]].concat();
    assert_eq!(env.vmbackup(&args).ok().json()["data"], "");
    let args = [&["nbd", "trim", &uri, "--length", "0"], &end[..]].concat();
    env.vmbackup(&args).ok();
}
