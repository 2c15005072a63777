//! `vmbackup serve` in TLS: real clients read a point from it, and who may not is told nothing.

use crate::pki::{KEY, Pki, Revoked, SERVER_NAME};
use crate::rig::{Serve, content, env_with_point, read};
use crate::support::TestEnv;

/// A server of the point on TCP with these options, and the test's own PKI.
struct Rig {
    env: TestEnv,
    pki: Pki,
    serve: Serve,
}

impl Rig {
    fn new(options: impl Fn(&Pki) -> Vec<String>) -> Self {
        let (pki, (env, point)) = (Pki::new(), env_with_point());
        let mut args = vec![point, "--listen".to_owned(), "127.0.0.1:0".to_owned()];
        args.extend(options(&pki));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let serve = Serve::start(&env, &args);
        Self { env, pki, serve }
    }

    fn with_certificates(more: &[&str]) -> Self {
        Self::new(|pki| {
            let dir = pki.server().display().to_string();
            let options = ["--tls-certificates", &dir].into_iter().chain(more.iter().copied());
            options.map(str::to_owned).collect()
        })
    }

    fn with_keys(more: &[&str]) -> Self {
        Self::new(|pki| {
            let file = pki.psk().display().to_string();
            let options = ["--tls-psk-file", &file].into_iter().chain(more.iter().copied());
            options.map(str::to_owned).collect()
        })
    }

    /// The printed URI with what a client adds.
    fn uri(&self, parameters: &str) -> String {
        format!("{}?{parameters}", self.serve.uri(0))
    }

    fn certificates(&self) -> String {
        self.uri(&format!("tls-certificates={}", self.pki.client().display()))
    }

    fn keys(&self) -> String {
        let uri = self.uri(&format!("tls-psk-file={}", self.pki.psk().display()));
        uri.replace("nbds://", "nbds://vmbackup@")
    }

    /// The printed URI without TLS.
    fn plain(&self) -> String {
        self.serve.uri(0).replace("nbds://", "nbd://")
    }

    fn nbdinfo(&self, uri: &str) -> bool {
        self.env.run("nbdinfo", &[uri]).code == Some(0)
    }

    /// What `qemu-img convert` reads with these credentials.
    fn qemu_img(&self, object: &str) -> Vec<u8> {
        let uri = self.serve.uri(0);
        let (_, place) = uri.split_once("://").unwrap();
        let (host_port, export) = place.split_once('/').unwrap();
        let (host, port) = host_port.split_once(':').unwrap();
        let options = format!("driver=nbd,host={host},port={port},export={export},tls-creds=t");
        let object = format!("{object},id=t,endpoint=client");
        let args = ["convert", "--object", &object, "--image-opts", &options, "-O", "raw", "q"];
        self.env.run("qemu-img", &args).ok();
        std::fs::read(self.env.path("q")).unwrap()
    }
}

#[test]
fn a_point_is_read_in_tls_with_certificates() {
    let rig = Rig::with_certificates(&[]);
    assert!(rig.serve.uri(0).starts_with("nbds://127.0.0.1:"), "{}", rig.serve.uri(0));
    assert!(rig.nbdinfo(&rig.certificates()));
    assert!(read(&rig.env, &rig.certificates()) == content(1));
    let dir = rig.pki.client();
    assert!(rig.qemu_img(&format!("tls-creds-x509,dir={}", dir.display())) == content(1));
    // And by our own client.
    rig.env.vmbackup(&["copy", &rig.certificates(), "own.raw"]).ok();
    assert!(std::fs::read(rig.env.path("own.raw")).unwrap() == content(1));
}

#[test]
fn a_point_is_read_in_tls_with_keys() {
    let rig = Rig::with_keys(&[]);
    assert!(rig.nbdinfo(&rig.keys()));
    assert!(read(&rig.env, &rig.keys()) == content(1));
    let file = rig.pki.psk();
    let dir = file.parent().unwrap().display();
    let object = format!("tls-creds-psk,dir={dir},username=vmbackup");
    assert!(rig.qemu_img(&object) == content(1));
    rig.env.vmbackup(&["copy", &rig.keys(), "own.raw"]).ok();
    assert!(std::fs::read(rig.env.path("own.raw")).unwrap() == content(1));
}

#[test]
fn info_tells_the_tls_of_the_session_and_who_is_at_its_other_end() {
    let rig = Rig::with_certificates(&["--tls", "on"]);
    let info = |uri: &str| rig.env.vmbackup(&["nbd", "info", uri, "--json"]).json();
    let report = info(&rig.certificates());
    assert_eq!(report["tls"]["version"], "TLSv1.3", "{report}");
    assert!(report["tls"]["cipher"].as_str().unwrap().starts_with("TLS_"), "{report}");
    assert_eq!(report["tls"]["peer"], "CN=server");
    let text = rig.env.vmbackup(&["nbd", "info", &rig.certificates()]).ok().stdout;
    assert!(text.contains("TLSv1.3 TLS_") && text.contains("certificate CN=server"), "{text}");
    assert!(info(&rig.plain())["tls"].is_null());
    let text = rig.env.vmbackup(&["nbd", "info", &rig.plain()]).ok().stdout;
    assert!(text.contains("TLS          none"), "{text}");
    let rig = Rig::with_keys(&[]);
    let report = rig.env.vmbackup(&["nbd", "info", &rig.keys(), "--json"]).json();
    assert!(report["tls"]["peer"].is_null() && report["tls"]["version"].is_string(), "{report}");
}

#[test]
fn tls_that_is_welcome_is_used_where_the_server_has_it_and_its_authority_is_known() {
    let rig = Rig::with_certificates(&["--tls", "on"]);
    let info = |pki: &Pki| {
        let certificates = pki.client();
        let uri = format!("{}?tls=on&tls-certificates={}", rig.plain(), certificates.display());
        rig.env.vmbackup(&["nbd", "info", &uri, "--json"])
    };
    assert_eq!(info(&rig.pki).json()["tls"]["version"], "TLSv1.3");
    // Not in plain text either: somebody in between could bring that about.
    info(&Pki::new()).fails_with(&["the certificate of NBD server", "is refused"]);
    let (env, pki) = (TestEnv::new(), &rig.pki);
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let serve = Serve::start(&env, &["disk.raw"]);
    let uri = format!("{}&tls=on&tls-certificates={}", serve.uri(0), pki.client().display());
    let outcome = env.vmbackup(&["nbd", "info", &uri]).ok();
    assert!(outcome.stdout.contains("TLS          none"), "{outcome:?}");
    assert!(outcome.stderr.contains("going on without"), "{outcome:?}");
}

#[test]
fn keys_that_everybody_can_read_are_warned_of_once() {
    let mode = |file: &std::path::Path, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(file, mode).unwrap();
    };
    for (bits, warned) in [(0o644, true), (0o666, true), (0o640, false), (0o600, false)] {
        let rig = Rig::with_keys(&[]);
        mode(&rig.pki.psk(), bits);
        let told = format!("chmod 600 {}", rig.pki.psk().display());
        // The client opens two connections.
        let outcome = rig.env.vmbackup(&["copy", &rig.keys(), "own.raw"]).ok();
        assert_eq!(outcome.stderr.matches(&told).count(), usize::from(warned), "{outcome:?}");
        let again = Serve::start(&rig.env, &["disk.raw", "--tls-psk-file", text(&rig.pki.psk())]);
        assert_eq!(again.stop().contains(&told), warned, "{bits:o}");
    }
    let rig = Rig::with_certificates(&[]);
    let (server, client) = (rig.pki.server(), rig.pki.client());
    for (bits, warned) in [(0o604, true), (0o600, false)] {
        let keys = [server.join("server-key.pem"), client.join("client-key.pem")];
        for key in &keys {
            mode(key, bits);
        }
        let told = keys.map(|key| format!("chmod 600 {}", key.display()));
        let serve = Serve::start(&rig.env, &["disk.raw", "--tls-certificates", text(&server)]);
        assert_eq!(serve.stop().contains(&told[0]), warned);
        let outcome = rig.env.vmbackup(&["nbd", "info", &rig.certificates()]).ok();
        assert_eq!(outcome.stderr.contains(&told[1]), warned, "{outcome:?}");
    }
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_unix_socket_speaks_tls_too() {
    let (env, pki) = (TestEnv::new(), Pki::new());
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let dir = pki.server().display().to_string();
    let serve = Serve::start(&env, &["disk.raw", "--tls-certificates", &dir]);
    let uri = serve.uri(0);
    assert!(uri.starts_with("nbds+unix:///disk.raw?socket="), "{uri}");
    let dir = pki.client();
    let uri = format!("{uri}&tls-certificates={}&tls-hostname={SERVER_NAME}", dir.display());
    assert!(read(&env, &uri) == content(1));
}

#[test]
fn who_has_no_good_credentials_is_not_let_in() {
    let rig = Rig::with_certificates(&[]);
    assert!(!rig.nbdinfo(&rig.plain()), "required is the default");
    let dir = |dir: std::path::PathBuf| rig.uri(&format!("tls-certificates={}", dir.display()));
    assert!(!rig.nbdinfo(&dir(rig.pki.bare_client())), "without a certificate");
    assert!(!rig.nbdinfo(&dir(rig.pki.foreign_client())), "of another authority");
    assert!(rig.nbdinfo(&dir(rig.pki.client())));
    let rig = Rig::with_keys(&[]);
    let file = rig.pki.psk_with(&format!("vmbackup:{}\n", KEY.replace('9', "8")));
    let wrong = rig.uri(&format!("tls-psk-file={}", file.display()));
    assert!(!rig.nbdinfo(&wrong.replace("nbds://", "nbds://vmbackup@")), "with a wrong key");
    assert!(!rig.nbdinfo(&rig.plain()));
    assert!(rig.nbdinfo(&rig.keys()));
}

#[test]
fn a_revoked_client_is_not_let_in() {
    for (whose, expected) in [(Revoked::Client, false), (Revoked::Another, true)] {
        let rig = Rig::new(|pki| {
            pki.revoke_client(whose);
            vec!["--tls-certificates".to_owned(), pki.server().display().to_string()]
        });
        assert_eq!(rig.nbdinfo(&rig.certificates()), expected);
    }
}

#[test]
fn clients_without_a_certificate_or_without_tls_come_in_where_it_was_said() {
    let rig = Rig::with_certificates(&["--tls-verify-peer", "false"]);
    let bare = rig.uri(&format!("tls-certificates={}", rig.pki.bare_client().display()));
    assert!(rig.nbdinfo(&bare));
    assert!(!rig.nbdinfo(&rig.plain()));
    let rig = Rig::with_certificates(&["--tls", "on"]);
    assert!(rig.nbdinfo(&rig.certificates()) && rig.nbdinfo(&rig.plain()));
}

#[test]
fn other_hosts_are_served_with_tls_required_and_refused_where_it_is_not() {
    let (env, pki) = (TestEnv::new(), Pki::new());
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let keys = pki.psk().display().to_string();
    let common = ["disk.raw", "--listen", "0.0.0.0:0", "--tls-psk-file", &keys];
    for mode in ["on", "off"] {
        let mut args = vec!["serve"];
        args.extend(common.iter().copied().chain(["--tls", mode]));
        let refused = env.vmbackup(&args);
        assert_eq!(refused.code, Some(2), "{refused:?}");
    }
    let serve = Serve::start(&env, &common);
    assert!(serve.uri(0).starts_with("nbds://0.0.0.0:"), "{}", serve.uri(0));
}

#[test]
fn wrong_options_are_refused_before_anything_listens() {
    let env = TestEnv::new();
    std::fs::write(env.path("disk.raw"), content(1)).unwrap();
    let code = |args: &[&str]| {
        let mut all = vec!["serve", "disk.raw", "--socket", "s"];
        all.extend(args);
        env.vmbackup(&all).code
    };
    assert_eq!(code(&["--tls", "require"]), Some(2), "without credentials");
    assert_eq!(code(&["--tls-psk-file", "a", "--tls-certificates", "b"]), Some(2), "with both");
    assert_eq!(code(&["--tls-psk-file", "a", "--tls-verify-peer", "false"]), Some(2));
    assert_eq!(code(&["--tls-certificates", "/nonexistent"]), Some(3));
    assert!(!env.path("s").exists());
}
