//! A backup of a plain QEMU that is stopped with Ctrl-C.

use crate::machine::{Guest, Machine};
use crate::support::TestEnv;

#[tokio::test]
async fn ctrl_c_ends_a_backup_of_a_plain_qemu_at_once_and_leaves_nothing() {
    let env = TestEnv::new();
    env.init_repo();
    let machine = Machine::filled(Guest::Still, 48).await;
    let (monitor, scratch) = (machine.path("qmp.sock"), machine.path("scratch"));
    let full = ["full", "--qmp", monitor.to_str().unwrap(), "--scratch-dir"];
    let full = [&full[..], &[scratch.to_str().unwrap()]].concat();
    let backup = env.stopped_at("after:export", &full);
    assert!(machine.ours().await.len() > 2, "a job, nodes and bitmaps");
    backup.ends_by_ctrl_c(10);
    machine.holds_only(&[]).await;
    assert_eq!(machine.tops().await, ["a", "b"]);
    assert_eq!(env.vmbackup(&["list", "--json"]).json()["points"], serde_json::json!([]));
    assert_eq!(env.vmbackup(&["recover"]).text(), "nothing is left to undo");
    env.vmbackup(&full).ok();
}
