//! Recordings of a real QEMU, played back: what a version said stays tested when it is gone.
//!
//! So far there are recordings of one version, QEMU 10.0.2. What others say, the oldest that is supported
//! (7.2) among them, is tested only where such a QEMU is installed (`live`).
//!
//! Renew them, with the QEMU installed, by
//! `QMP_RECORD=1 cargo test -p vmbackup-qmp --test monitor live::` and name the version in the
//! file name. The playing peer compares every command with the recording.

use crate::{peer, scenarios};

/// Plays `transcripts/$file`, runs the scenario and checks that nothing was left unsaid.
macro_rules! replays {
    ($test:ident, $scenario:ident, $file:literal) => {
        #[tokio::test]
        async fn $test() {
            let (monitor, playing) = peer::play(include_str!(concat!("transcripts/", $file))).await;
            scenarios::$scenario(&monitor).await;
            drop(monitor);
            playing.await.unwrap();
        }
    };
}

replays!(bitmaps_as_qemu_10_0_2_does_them, bitmaps, "bitmaps-10.0.2.txt");
replays!(a_pull_backup_as_qemu_10_0_2_does_it, pull_backup, "pull_backup-10.0.2.txt");
replays!(features_of_qemu_10_0_2, schema, "schema-10.0.2.txt");
