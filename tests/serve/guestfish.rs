//! guestfish looks into a served point: files out of a backup without a restore.
//!
//! guestfish builds a small system of its own, from the kernel of our guest, the same on every machine:
//! one may have none.

use std::path::Path;

use crate::rig::{Serve, back_up};
use crate::support::TestEnv;

#[test]
fn guestfish_reads_files_out_of_a_served_point() {
    let env = TestEnv::new();
    env.init_repo();
    std::fs::create_dir_all(env.path("tree/etc")).unwrap();
    std::fs::write(env.path("tree/etc/motd"), "from the backup\n").unwrap();
    env.run("mkfs.ext4", &["-q", "-d", "tree", "disk.raw", "64M"]).ok();
    let point = back_up(&env);
    // What is served is the point, not the image.
    std::fs::write(env.path("disk.raw"), "").unwrap();
    let serve = Serve::start(&env, &[&point]);
    let export = serve.report["exports"][0]["name"].as_str().unwrap();
    let uri = format!("nbd:///{export}?socket={}", serve.socket().display());
    let mut guestfish = env.command("guestfish");
    guestfish
        .args(["--ro", "--format=raw", "-a", &uri, "-m", "/dev/sda", "cat", "/etc/motd"])
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        .env("LIBGUESTFS_CACHEDIR", env.dir());
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/testbed/kernel");
    let named = std::fs::read_dir(kernel.join("boot")).expect("tests/setup.sh fetches it");
    let version = named
        .filter_map(|entry| {
            entry.unwrap().file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned)
        })
        .max()
        .expect("a kernel");
    env.run("depmod", &["-b", kernel.to_str().unwrap(), &version]).ok();
    guestfish.env("SUPERMIN_KERNEL", kernel.join("boot").join(format!("vmlinuz-{version}")));
    guestfish.env("SUPERMIN_MODULES", kernel.join("lib/modules").join(&version));
    let output = guestfish.output().expect("guestfish is installed (tests/run.sh does)");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.trim_end(), "from the backup", "{}", String::from_utf8_lossy(&output.stderr));
    serve.stop();
}
