//! guestfish looks into a served point: files out of a backup without a restore.
//!
//! In the soak tier only: guestfish brings ninety packages and builds a small system of its own.

use crate::rig::{Serve, back_up};
use crate::support::TestEnv;

#[test]
#[ignore = "soak: needs guestfish, and boots its appliance without hardware help"]
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
    // The kernel of its appliance, if one is given (tests/run.sh --soak does), else the machine's own.
    let given = |name| Some((name, std::env::var_os(name)?));
    guestfish.envs(["SUPERMIN_KERNEL", "SUPERMIN_MODULES"].into_iter().filter_map(given));
    let output = guestfish.output().expect("guestfish is installed (tests/run.sh --soak does)");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.trim_end(), "from the backup", "{}", String::from_utf8_lossy(&output.stderr));
    serve.stop();
}
