//! A conversation with a peer that says anything: shared by the bounded run of `hostile.rs` and by the
//! coverage-guided one in `fuzz/`.

use std::time::Duration;

use qmp::{Monitor, Options};
use tokio::io::AsyncWriteExt;

use crate::peer::{GREETING, Listener};

/// The client ends in time, with an answer or an error, whatever a peer says and wherever it stops.
pub(crate) fn ends_in_time(greets: bool, pieces: &[Vec<u8>]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = Listener::new();
        let address = listener.address();
        let options =
            Options { greeting: Duration::from_millis(50), command: Duration::from_millis(50) };
        let serve = async {
            let mut peer = listener.accept().await;
            if greets {
                let _ = peer.writer.write_all(GREETING.as_bytes()).await;
            }
            for bytes in pieces {
                // The client may have hung up already.
                let _ = peer.writer.write_all(bytes).await;
            }
        };
        let talk = async {
            if let Ok(monitor) = Monitor::connect(&address, options).await {
                let _ = tokio::join!(monitor.query_status(), monitor.query_jobs());
            }
        };
        let both = async { tokio::join!(serve, talk) };
        tokio::time::timeout(Duration::from_secs(5), both).await.expect("it ends in time");
    });
}
