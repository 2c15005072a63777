//! `vmbackup nbd write|zero|trim|flush|bench` against nbdkit, qemu-nbd and our own server.

use serde_json::Value;

use crate::rig::Serve;
use crate::support::{NbdServer, TestEnv};

/// nbdkit with a disk in memory of `size`, and a log of what it is asked.
fn logged(env: &TestEnv, size: &str) -> NbdServer {
    NbdServer::nbdkit(env, &["--filter=log", "memory", size, "logfile=log"])
}

fn log(env: &TestEnv) -> String {
    std::fs::read_to_string(env.path("log")).unwrap()
}

fn bytes(env: &TestEnv, uri: &str) -> String {
    let report = env.vmbackup(&["nbd", "read", uri, "--json", "--length", "8"]).ok().json();
    report["data"].as_str().unwrap().to_owned()
}

#[test]
fn bytes_are_written_where_they_belong_from_digits_files_and_pipes() {
    let env = TestEnv::new();
    let server = logged(&env, "1M");
    let uri = server.uri("");
    let report = env.vmbackup(&["nbd", "write", &uri, "--offset", "2", "--hex", "0aFf", "--json"]);
    let report = report.ok().json();
    assert_eq!((&report["offset"], &report["bytes"]), (&2.into(), &2.into()));
    assert_eq!(report["durable"], false);
    assert_eq!(bytes(&env, &uri), "00000aff00000000");
    std::fs::write(env.path("b"), [1, 2]).unwrap();
    env.vmbackup(&["nbd", "write", &uri, "--file", "b", "--fua"]).ok();
    assert_eq!(bytes(&env, &uri), "01020aff00000000");
    let program = env!("CARGO_BIN_EXE_vmbackup");
    let line = format!("printf xyz | {program} nbd write --offset 5 '{uri}'");
    env.run("bash", &["-c", &line]).ok();
    assert_eq!(bytes(&env, &uri), "01020aff0078797a");
    let log = log(&env);
    assert!(log.contains("Write") && log.contains("fua=1"), "{log}");
}

#[test]
fn what_is_no_range_of_the_export_is_refused_unsent() {
    let env = TestEnv::new();
    let blocks = ["--filter=blocksize-policy", "--filter=log", "memory", "1M", "logfile=log"];
    let policy = ["blocksize-minimum=512", "blocksize-error-policy=error"];
    let server = NbdServer::nbdkit(&env, &[&blocks[..], &policy[..]].concat());
    let uri = server.uri("");
    for args in [
        &["write", "--hex", "0"][..],
        &["write", "--offset", "1M", "--hex", "00"],
        &["zero", "--offset", "100", "--length", "512"],
        &["zero", "--length", "2M"],
        &["trim", "--offset", "512", "--length", "1M"],
        &["trim", "--offset", "18446744073709551615", "--length", "512"],
    ] {
        let all: Vec<&str> = ["nbd", args[0], &uri].iter().chain(&args[1..]).copied().collect();
        let outcome = env.vmbackup(&all);
        assert_eq!(outcome.code, Some(2), "{args:?}: {outcome:?}");
    }
    let log = log(&env);
    for request in ["Write", "Zero", "Trim"] {
        assert!(!log.contains(request), "{log}");
    }
    env.vmbackup(&["nbd", "zero", &uri, "--length", "512"]).ok();
    let read_only = NbdServer::nbdkit(&env, &["-r", "memory", "1M"]);
    let outcome = env.vmbackup(&["nbd", "trim", &read_only.uri(""), "--length", "512"]);
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
}

#[test]
fn zeroes_trims_and_flushes_reach_the_server_as_they_were_meant() {
    let env = TestEnv::new();
    let server = logged(&env, "1M");
    let uri = server.uri("");
    env.vmbackup(&["nbd", "write", &uri, "--hex", "0102030405060708"]).ok();
    env.vmbackup(&["nbd", "zero", &uri, "--offset", "512", "--length", "512", "--allocated"]).ok();
    assert_eq!(bytes(&env, &uri), "0102030405060708");
    env.vmbackup(&["nbd", "zero", &uri, "--length", "512", "--fast"]).ok();
    assert_eq!(bytes(&env, &uri), "0000000000000000");
    let report = env.vmbackup(&["nbd", "trim", &uri, "--length", "64k", "--fua", "--json"]);
    assert_eq!(report.ok().json()["durable"], true);
    env.vmbackup(&["nbd", "flush", &uri]).ok();
    let log = log(&env);
    let line = |name: &str, what: &str| {
        let found = log.lines().any(|line| line.contains(name) && line.contains(what));
        assert!(found, "no {name} with {what} in {log}");
    };
    line(" Zero ", "trim=0 fua=0 fast=0");
    line(" Zero ", "trim=1 fua=0 fast=1");
    line(" Trim ", "count=0x10000 fua=1");
    line(" Flush ", "");
}

#[test]
fn what_a_server_cannot_is_said_and_not_asked() {
    let env = TestEnv::new();
    let server = NbdServer::nbdkit(&env, &["--filter=nozero", "memory", "1M", "zeromode=none"]);
    let uri = server.uri("");
    let fast = env.vmbackup(&["nbd", "zero", &uri, "--length", "4k", "--fast"]);
    assert_eq!(fast.code, Some(8), "{fast:?}");
    env.vmbackup(&["nbd", "write", &uri, "--hex", "ff"]).ok();
    env.vmbackup(&["nbd", "zero", &uri, "--length", "4k"]).ok();
    assert_eq!(bytes(&env, &uri), "0000000000000000", "by writing zeroes");
}

#[test]
fn an_image_behind_qemu_nbd_and_one_of_ours_are_changed_alike() {
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), vec![0x55; 1 << 20]).unwrap();
    let serve = Serve::start(&env, &["disk.raw", "--writable"]);
    let change = |uri: &str| {
        env.vmbackup(&["nbd", "write", uri, "--offset", "512", "--hex", &"ab".repeat(512)]).ok();
        env.vmbackup(&["nbd", "zero", uri, "--offset", "4k", "--length", "8k", "--fua"]).ok();
        env.vmbackup(&["nbd", "flush", uri]).ok();
    };
    change(&serve.uri(0));
    serve.stop();
    let ours = std::fs::read(env.path("disk.raw")).unwrap();
    assert!(ours[512..1024].iter().all(|byte| *byte == 0xab));
    assert!(ours[4096..12288].iter().all(|byte| *byte == 0));
    std::fs::write(env.path("other.raw"), vec![0x55; 1 << 20]).unwrap();
    let socket = env.path("q");
    let mut command = env.command("qemu-nbd");
    command.args(["-f", "raw", "-t", "-k"]).arg(&socket).arg("other.raw");
    let _server = crate::support::Process::spawn(&mut command);
    crate::support::wait_until("qemu-nbd", 20, || crate::support::is_listening(&socket));
    change(&format!("nbd+unix:///?socket={}", socket.display()));
    assert!(std::fs::read(env.path("other.raw")).unwrap() == ours);
}

#[test]
fn a_benchmark_reads_and_leaves_the_export_as_it_is_unless_told_otherwise() {
    let env = TestEnv::new();
    let server = NbdServer::nbdkit(&env, &["--filter=delay", "memory", "1M", "rdelay=10ms"]);
    let uri = server.uri("");
    let bench = |more: &[&str]| {
        let args = ["nbd", "bench", &uri, "--time", "1", "--requests", "4", "--json"];
        env.vmbackup(&[&args[..], more].concat()).ok().json()
    };
    let report = bench(&["--request-size", "4k", "--random"]);
    let number = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
    assert_eq!(number(&report, "bytes"), number(&report, "requests") * 4096);
    // Each takes 10 ms and four are under way: 400 a second at most.
    let requests = number(&report, "requests");
    assert!((40..=440).contains(&requests), "{report}");
    let latency = &report["latency_us"];
    let order = ["min", "p50", "p90", "p99", "p999", "max"].map(|name| number(latency, name));
    assert!(order.is_sorted() && order[0] >= 9_000, "{latency}");
    assert_eq!(bytes(&env, &uri), "0000000000000000");
    let report = bench(&["--overwrite"]);
    assert!(number(&report, "requests") > 0, "{report}");
    assert_ne!(bytes(&env, &uri), "0000000000000000");
    assert_eq!((number(&report, "reads"), &report["read_latency_us"]), (0, &Value::Null));
    let report = bench(&["--mix-reads", "70", "--request-size", "4k", "--random"]);
    let (reads, writes) = (number(&report, "reads"), number(&report, "writes"));
    assert_eq!(reads + writes, number(&report, "requests"));
    assert!(reads > writes && writes > 0, "{report}");
    // Only reads are delayed.
    let half = |name: &str| number(&report[name], "p50");
    assert!(half("read_latency_us") >= 9_000 && half("write_latency_us") < 9_000, "{report}");
    for wrong in ["2M", "0"] {
        let outcome = env.vmbackup(&["nbd", "bench", &uri, "--request-size", wrong]);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
    }
}
