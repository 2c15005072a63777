//! A disk whose content is elsewhere, behind a server that counts what is read and is as slow as a test wants.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::env::TestEnv;
use super::nbd_log::NbdLog;
use super::tools::NbdServer;

/// What is below the image.
pub(crate) struct SlowDisk {
    log: PathBuf,
    /// Bits per second, read anew by nbdkit's filter for each request.
    rate: PathBuf,
    _server: NbdServer,
}

impl SlowDisk {
    /// Puts one, full of a pattern, below a qcow2 image, which is made anew.
    pub(crate) fn below(env: &TestEnv, image: &Path, size: &str) -> Self {
        let (log, rate) = (env.path("reads.log"), env.path("rate"));
        let (to_log, from) =
            (format!("logfile={}", log.display()), format!("rate-file={}", rate.display()));
        let filters = ["--filter=log", "--filter=rate", "pattern", size, &to_log, &from];
        let server = NbdServer::nbdkit(env, &filters);
        // QEMU has a user of its own.
        for (path, mode) in [(env.path("run"), 0o755), (server.socket().to_owned(), 0o777)] {
            fs::set_permissions(path, Permissions::from_mode(mode)).expect("own file");
        }
        let (image, below) = (image.to_string_lossy(), server.uri(""));
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &below, &image];
        env.run("qemu-img", &create).ok();
        let disk = Self { log, rate, _server: server };
        disk.be_fast();
        disk
    }

    /// From now on it gives 2 MiB in a second.
    pub(crate) fn be_slow(&self) {
        fs::write(&self.rate, "16M").expect("own file");
    }

    /// From now on it is as fast as it can be.
    pub(crate) fn be_fast(&self) {
        fs::write(&self.rate, "100G").expect("own file");
    }

    /// How much has been read of it.
    pub(crate) fn read_bytes(&self) -> usize {
        NbdLog::of(&self.log).bytes("Read")
    }
}
