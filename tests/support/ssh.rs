//! A way to this machine as if it were another: an SSH daemon of the test's own on a free port.
//!
//! What the commands of the test's environment learn of hosts is kept in its directory: ssh would write to the
//! home that the user has by passwd, whatever the environment says, and no parameter of libvirt's URIs tells it
//! another file.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::env::TestEnv;
use super::tools::{Process, wait_until};

/// An SSH daemon that lets the test's key in as root.
pub(crate) struct Ssh {
    port: u16,
    key: PathBuf,
    daemon: Process,
}

impl Ssh {
    /// Starts one on a free port.
    pub(crate) fn start(env: &TestEnv) -> Self {
        let path = |name: &str| env.path(name).to_string_lossy().into_owned();
        for key in ["hostkey", "key"] {
            env.run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]).ok();
        }
        std::fs::copy(env.path("key.pub"), env.path("authorized")).expect("own directory");
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(env.path("authorized"), private).expect("own file");
        // Separated privileges want a directory that only root has; systems make it at boot.
        std::fs::create_dir_all("/run/sshd").expect("tests run as root");
        let port =
            TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
        let options = [
            "Port=PORT",
            "ListenAddress=127.0.0.1",
            "HostKey=DIR/hostkey",
            "UsePAM=no",
            "AuthorizedKeysFile=DIR/authorized",
            "StrictModes=no",
            "PidFile=none",
            "PermitRootLogin=prohibit-password",
            "PasswordAuthentication=no",
        ];
        let mut command = env.command("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f", "/dev/null"]);
        let dir = env.dir().to_string_lossy();
        for option in options {
            let option = option.replace("PORT", &port.to_string()).replace("DIR", &dir);
            command.args(["-o", &option]);
        }
        let daemon = Process::spawn(&mut command);
        wait_until("sshd", 20, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        let (program, hosts) = (env.path("bin/ssh"), env.path("known_hosts"));
        let script = format!(
            "#!/bin/sh\nexec /usr/bin/ssh -o UserKnownHostsFile={} \"$@\"\n",
            hosts.display()
        );
        std::fs::create_dir(env.path("bin")).expect("own directory");
        std::fs::write(&program, script).expect("own directory");
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&program, executable).expect("own file");
        Self { port, key: env.path("key"), daemon }
    }

    /// This machine's libvirt, as one that is elsewhere: for commands of the test's environment.
    pub(crate) fn uri(&self) -> String {
        let (port, key) = (self.port, self.key.display());
        format!("qemu+ssh://root@127.0.0.1:{port}/system?keyfile={key}&no_verify=1")
    }

    /// Cuts all that goes through it; it lets in who comes anew.
    pub(crate) fn cut(&self, env: &TestEnv) {
        env.run("pkill", &["-KILL", "-P", &self.daemon.id().to_string()]).ok();
    }

    /// Who is let in now: a process for each.
    pub(crate) fn sessions(&self, env: &TestEnv) -> Vec<String> {
        let listed = env.run("pgrep", &["-a", "-P", &self.daemon.id().to_string()]);
        listed.stdout.lines().map(str::to_owned).collect()
    }
}
