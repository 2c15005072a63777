//! Points, straight from the repository.

use crate::rig::{DISK_BYTES, Serve, back_up, content, env_with_point, qemu_io, read};
use crate::support::TestEnv;

#[test]
fn a_served_point_is_the_disk_that_was_backed_up() {
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point]);
    assert_eq!(serve.report["document"], "serve");
    assert_eq!(serve.report["exports"][0]["writable"], false);
    let uri = serve.uri(0);
    assert!(read(&env, &uri) == content(1));
    env.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, "disk.raw"]).ok();
    assert_ne!(qemu_io(&env, &uri, &["write 0 512"]).code, Some(0), "it is read-only");
    // A hole is told, not sent.
    let map = env.run("nbdinfo", &["--map", "--totals", &uri]).ok().stdout;
    assert!(map.contains("hole,zero"), "{map}");
    let socket = serve.socket();
    serve.stop();
    assert!(!socket.exists());
}

#[test]
fn a_point_is_named_as_everywhere_and_one_without_the_disk_is_refused() {
    let (env, _) = env_with_point();
    let serve = Serve::start(&env, &["web@latest", "--socket", "s"]);
    assert!(serve.uri(0).ends_with(&format!("socket={}", env.path("s").display())));
    assert_eq!(env.vmbackup(&["serve", "web@latest", "--disk", "vdz"]).code, Some(3));
    assert_eq!(env.vmbackup(&["serve", "nobody@latest"]).code, Some(3));
    assert_eq!(env.vmbackup(&["serve", "web@latest", "--socket", "s"]).code, Some(7));
}

#[test]
fn several_points_are_exports_named_by_vm_and_point() {
    let (env, first) = env_with_point();
    std::fs::write(env.path("disk.raw"), content(2)).unwrap();
    let second = back_up(&env);
    let serve = Serve::start(&env, &[&first, &second]);
    let name = serve.report["exports"][1]["name"].as_str().unwrap();
    assert!(name.starts_with(&format!("web@{}/", &second[..8])), "{name}");
    assert!(read(&env, &serve.uri(0)) == content(1));
    assert!(read(&env, &serve.uri(1)) == content(2));
    let list = env.run("nbdinfo", &["--list", &serve.uri(0)]).ok().stdout;
    assert!(list.contains(name), "{list}");
}

#[test]
fn writes_go_to_an_overlay_that_is_thrown_away() {
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point, "--writable"]);
    let uri = serve.uri(0);
    let commands = ["write -P 7 1000 5000", "write -z 3M 64k", "discard 4M 64k", "flush"];
    qemu_io(&env, &uri, &commands).ok();
    let mut expected = content(1);
    expected[1000..6000].fill(7);
    expected[3 << 20..(3 << 20) + 65536].fill(0);
    expected[4 << 20..(4 << 20) + 65536].fill(0);
    assert!(read(&env, &uri) == expected);
    serve.stop();
    env.vmbackup(&["verify", &point, "--against", "disk.raw"]).ok();
    let serve = Serve::start(&env, &[&point, "--writable"]);
    assert!(read(&env, &serve.uri(0)) == content(1), "nothing is left of it");
}

#[test]
fn a_kept_overlay_goes_on_where_it_was_and_fits_its_own_disk_only() {
    let (env, point) = env_with_point();
    let args = [&point, "--writable", "--overlay", "o"];
    let serve = Serve::start(&env, &args);
    qemu_io(&env, &serve.uri(0), &["write -P 7 1000 5000"]).ok();
    serve.stop();
    let mut expected = content(1);
    expected[1000..6000].fill(7);
    let serve = Serve::start(&env, &args);
    assert!(read(&env, &serve.uri(0)) == expected);
    assert_eq!(env.vmbackup(&["serve", &point, "--writable", "--overlay", "o"]).code, Some(7));
    drop(serve);
    std::fs::write(env.path("disk.raw"), content(2)).unwrap();
    let other = back_up(&env);
    assert_eq!(env.vmbackup(&["serve", &other, "--writable", "--overlay", "o"]).code, Some(2));
}

#[test]
fn a_disk_that_was_grown_is_seen_by_clients_that_connect_afterwards() {
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point, "--writable", "--size", "8M"]);
    assert_eq!(serve.report["exports"][0]["size_bytes"], 8 << 20);
    let mut expected = content(1);
    expected.resize(8 << 20, 0);
    assert!(read(&env, &serve.uri(0)) == expected);
    serve.stop();
    let kept = [&point, "--writable", "--overlay", "o"];
    let serve = Serve::start(&env, &kept);
    qemu_io(&env, &serve.uri(0), &["write -P 7 1000 5000"]).ok();
    serve.stop();
    let serve = Serve::start(&env, &[&kept[..], &["--size", "8M"]].concat());
    qemu_io(&env, &serve.uri(0), &["write -P 8 7M 64k"]).ok();
    serve.stop();
    let serve = Serve::start(&env, &kept);
    expected[1000..6000].fill(7);
    expected[7 << 20..(7 << 20) + 65536].fill(8);
    assert!(read(&env, &serve.uri(0)) == expected);
    serve.stop();
    for wrong in ["1M", "6M"] {
        let args = ["serve", &point, "--writable", "--overlay", "o", "--size", wrong];
        assert_eq!(env.vmbackup(&args).code, Some(2), "{wrong}");
    }
    let image = ["serve", "disk.raw", "--writable", "--size", "8M"];
    assert_eq!(env.vmbackup(&image).code, Some(2), "only what has an overlay grows");
}

/// The size that clients see who connect now.
fn size(env: &TestEnv, uri: &str) -> u64 {
    let told = env.run("nbdinfo", &["--size", uri]).ok().stdout;
    let image = env.run("qemu-img", &["info", "--output=json", "-f", "raw", uri]).ok().stdout;
    let image: serde_json::Value = serde_json::from_str(&image).unwrap();
    let told = told.trim().parse().unwrap();
    assert_eq!(image["virtual-size"], told);
    told
}

/// A client that connects, says so, waits, reads the last block it knows of and the size it sees.
const PATIENT: &str = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1])\n\
    s = h.get_size(); h.pwrite(b'x' * 512, s - 4096); print('in', flush=True); sys.stdin.read()\n\
    assert h.pread(512, s - 4096) == b'x' * 512; h.pwrite(b'y' * 512, s - 4096); h.flush()\n\
    assert h.get_size() == s; print(s)";

fn patient(env: &TestEnv, uri: &str) -> std::process::Child {
    let mut client = env.command("/usr/bin/python3");
    client.args(["-c", PATIENT, uri]);
    client.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut client = client.spawn().unwrap();
    let mut said = [0; 3];
    std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut said).unwrap();
    client
}

/// Lets it go on; what it saw.
fn seen(mut client: std::process::Child) -> u64 {
    drop(client.stdin.take());
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

#[test]
fn an_overlay_grows_while_it_is_served_and_clients_that_are_there_keep_their_size() {
    let (env, point) = env_with_point();
    let kept = [&point, "--writable", "--overlay", "o"];
    let serve = Serve::start(&env, &kept);
    let uri = serve.uri(0);
    let old = DISK_BYTES as u64;
    assert_eq!(size(&env, &uri), old);
    let client = patient(&env, &uri);
    let again = env.vmbackup(&[&["serve"], &kept[..], &["--size", "8M"]].concat());
    assert_eq!(again.code, Some(7), "{again:?}");
    again.fails_with(&["another process serves the overlay", "clients that connect", "8388608"]);
    assert_eq!(size(&env, &uri), 8 << 20);
    qemu_io(&env, &uri, &["write -P 8 7M 64k"]).ok();
    let mut expected = content(1);
    expected.resize(8 << 20, 0);
    expected[7 << 20..(7 << 20) + 65536].fill(8);
    expected[DISK_BYTES - 4096..DISK_BYTES - 4096 + 512].fill(b'x');
    assert!(read(&env, &uri) == expected);
    assert_eq!(seen(client), old);
    expected[DISK_BYTES - 4096..DISK_BYTES - 4096 + 512].fill(b'y');
    assert!(read(&env, &uri) == expected, "both write the same disk");
    serve.stop();
    let serve = Serve::start(&env, &kept);
    assert!(read(&env, &serve.uri(0)) == expected, "it stays");
}

/// Found in review: what the map of the whole disk would take was taken twice, 960 MiB here.
#[test]
fn an_overlay_of_a_huge_disk_takes_memory_for_what_is_written() {
    let (env, point) = env_with_point();
    let kept = [&point, "--writable", "--overlay", "o"];
    // Less than the largest file of ext4.
    let serve = Serve::start(&env, &[&kept[..], &["--size", "15T"]].concat());
    let far = ["write -P 7 14T 64k", "flush", "write -P 8 3T 64k", "flush"];
    qemu_io(&env, &serve.uri(0), &far).ok();
    assert!(serve.peak_mib() < 200, "{} MiB when it is made", serve.peak_mib());
    serve.stop();
    let serve = Serve::start(&env, &kept);
    assert_eq!(size(&env, &serve.uri(0)), 15 << 40);
    let found = ["read -P 7 14T 64k", "read -P 8 3T 64k", "read -P 0 7T 64k"];
    let said = qemu_io(&env, &serve.uri(0), &found).ok().stdout;
    assert!(!said.contains("verification failed"), "{said}");
    assert!(serve.peak_mib() < 200, "{} MiB when it is opened", serve.peak_mib());
}

#[test]
fn a_raw_file_that_has_grown_is_seen_by_clients_that_connect_afterwards() {
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let serve = Serve::start(&env, &["disk.raw", "--writable"]);
    let uri = serve.uri(0);
    let client = patient(&env, &uri);
    env.run("truncate", &["-s", "8M", "disk.raw"]).ok();
    assert_eq!(size(&env, &uri), 8 << 20);
    qemu_io(&env, &uri, &["write -P 8 7M 64k"]).ok();
    assert_eq!(seen(client), DISK_BYTES as u64);
    let mut expected = content(1);
    expected.resize(8 << 20, 0);
    expected[7 << 20..(7 << 20) + 65536].fill(8);
    expected[DISK_BYTES - 4096..DISK_BYTES - 4096 + 512].fill(b'y');
    assert!(read(&env, &uri) == expected);
    serve.stop();
    assert!(std::fs::read(env.path("disk.raw")).unwrap() == expected);
}

#[test]
fn a_point_stays_readable_while_it_is_served_whatever_gc_does() {
    let (env, point) = env_with_point();
    std::fs::write(env.path("disk.raw"), content(2)).unwrap();
    back_up(&env);
    let serve = Serve::start(&env, &[&point, "--cache", "0"]);
    env.vmbackup(&["forget", &point]).ok();
    for _ in 0..2 {
        let report = env.vmbackup(&["gc", "--json"]).json();
        let waiting = report["waiting_for"].as_array().unwrap();
        assert!(waiting[0].as_str().unwrap().starts_with("read-"), "{report}");
        assert_eq!(report["freed_bytes"], 0, "{report}");
    }
    assert!(read(&env, &serve.uri(0)) == content(1));
    serve.stop();
    env.vmbackup(&["gc"]).ok();
    let report = env.vmbackup(&["gc", "--json"]).json();
    assert_eq!(report["waiting_for"].as_array().unwrap().len(), 0, "{report}");
}

#[test]
fn plain_text_is_served_to_other_hosts_only_on_request() {
    let (env, point) = env_with_point();
    let refused = env.vmbackup(&["serve", &point, "--listen", "0.0.0.0:0"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let serve = Serve::start(&env, &[&point, "--listen", "127.0.0.1:0"]);
    assert!(serve.uri(0).starts_with("nbd://127.0.0.1:"));
    assert!(read(&env, &serve.uri(0)) == content(1));
    let serve = Serve::start(&env, &[&point, "--listen", "[::]:0", "--insecure-tcp"]);
    assert!(serve.uri(0).starts_with("nbd://[::]:"), "{}", serve.uri(0));
    // Any guest of this host may connect there.
    let refused = env.vmbackup(&["serve", &point, "--listen", "vsock:10809"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    refused.fails_with(&["vsock:10809", "guests", "--insecure-tcp"]);
    for wrong in ["vsock:", "vsock:4294967296", "vsock:x"] {
        env.vmbackup(&["serve", &point, "--listen", wrong]).fails_with(&["vsock"]);
    }
    // A socket that was handed over is looked at, too: 0.0.0.0 here.
    let script = "import os, socket, sys\n\
                  s = socket.create_server(('0.0.0.0', 0))\n\
                  os.dup2(os.dup(s.fileno()), 3)\n\
                  os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n\
                  os.execvp(sys.argv[1], sys.argv[1:])";
    let program = env!("CARGO_BIN_EXE_vmbackup");
    let refused = env.run("python3", &["-c", script, program, "serve", "disk.raw"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    // One that does not listen for streams is none.
    let datagrams =
        script.replace("create_server(('0.0.0.0', 0))", "socket(type=socket.SOCK_DGRAM)");
    assert_ne!(datagrams, script);
    env.run("python3", &["-c", &datagrams, program, "serve", "disk.raw"])
        .fails_with(&["inherited socket"]);
}

#[test]
fn a_client_that_breaks_the_rules_is_told_of() {
    use std::io::{Read, Write};
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point]);
    let mut client = std::os::unix::net::UnixStream::connect(serve.socket()).unwrap();
    client.write_all(&[0xee; 4096]).unwrap();
    let mut rest = Vec::new();
    // Cut off: what is said before is the greeting.
    let _ = client.read_to_end(&mut rest);
    let stderr = serve.stop();
    assert!(stderr.contains("a client was cut off") && stderr.contains("reason"), "{stderr}");
}

#[test]
fn a_client_that_is_refused_is_told_of() {
    let (env, point) = env_with_point();
    let serve = Serve::start(&env, &[&point, "--max-connections", "1", "--client-memory", "64M"]);
    let mut guest = env.command("/usr/bin/python3");
    guest.args([
        "-c",
        "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(512, 0)\n\
         print('in', flush=True); sys.stdin.read()",
        &serve.uri(0),
    ]);
    guest.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut guest = guest.spawn().unwrap();
    let mut said = [0; 3];
    std::io::Read::read_exact(guest.stdout.as_mut().unwrap(), &mut said).unwrap();
    assert_ne!(env.run("nbdcopy", &[&serve.uri(0), "null:"]).code, Some(0));
    let outcome = env.vmbackup(&["copy", &serve.uri(0), "null:"]);
    outcome.fails_with(&["all 1 places are taken"]);
    drop(guest.stdin.take());
    guest.wait().unwrap();
    env.run("nbdcopy", &[&serve.uri(0), "null:"]).ok();
    let stderr = serve.stop();
    assert!(stderr.contains("a client was refused"), "{stderr}");
    assert!(stderr.contains("--max-connections"), "{stderr}");
}

#[test]
fn memory_that_so_many_clients_cannot_share_is_refused_with_what_they_need() {
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    for (connections, memory, least) in [("1", "1M", "64M"), ("2000", "64M", "157M")] {
        let args = ["--max-connections", connections, "--client-memory", memory];
        let outcome = env.vmbackup(&[&["serve", "disk.raw"], &args[..]].concat());
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        outcome.fails_with(&[&format!("--client-memory {least}"), "--max-connections"]);
        let args = ["disk.raw", "--max-connections", connections, "--client-memory", least];
        Serve::start(&env, &args).stop();
    }
}
