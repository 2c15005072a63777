//! Commands that are stopped with Ctrl-C.

use std::fs;

use crate::support::TestEnv;

#[test]
fn ctrl_c_ends_a_restore_at_once_and_leaves_nothing_in_its_directory() {
    let env = TestEnv::new();
    env.init_repo();
    let noise = env.path("a.raw");
    env.run("dd", &["if=/dev/urandom", "of=a.raw", "bs=1M", "count=64", "status=none"]).ok();
    let full = ["full", "--name", "web", "--image", "a.raw", "--json"];
    let point = env.vmbackup(&full).json()["point"].as_str().unwrap().to_owned();
    // One that is made, and one that was there with something in it.
    fs::create_dir(env.path("there")).unwrap();
    fs::write(env.path("there/a.raw"), "precious").unwrap();
    for (to, names) in [("fresh", &[][..]), ("there", &["a.raw"])] {
        let restore = ["restore", &point, "--to", to, "--force"];
        let run = env.stopped_at("after:temporary", &restore);
        run.ends_by_ctrl_c(10);
        let left = fs::read_dir(env.path(to)).into_iter().flatten();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, names, "{to}");
        assert_eq!(env.path(to).exists(), to == "there");
        assert_eq!(env.vmbackup(&["recover"]).text(), "nothing is left to undo");
    }
    assert_eq!(fs::read(env.path("there/a.raw")).unwrap(), b"precious");
    env.vmbackup(&["restore", &point, "--to", "there", "--force"]).ok();
    assert_eq!(fs::read(env.path("there/a.raw")).unwrap(), fs::read(noise).unwrap());
}
