//! A session with a client that says given bytes, whatever they are: shared by the bounded run of
//! `fuzz.rs` and by the coverage-guided one in `fuzz/`.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmbackup::nbd::server::Limits;

use crate::raw::{LONG, Raw, option_bytes};
use crate::rig::limits;

/// A session with a client that says these bytes and hangs up; how it ended.
async fn session(bytes: &[u8]) -> String {
    let short = Duration::from_secs(5);
    let limits = Limits { handshake: short, stall: short, ..limits() };
    let mut raw = Raw::connect(limits).await;
    let (mut reading, mut writing) = tokio::io::split(&mut raw.stream);
    let mut said = Vec::new();
    let speak = async {
        if writing.write_all(bytes).await.is_ok() {
            let _ = writing.shutdown().await;
        }
    };
    let talk = async { tokio::join!(speak, reading.read_to_end(&mut said)) };
    let _ = tokio::time::timeout(LONG, talk).await.expect("the server hangs up");
    assert!(said.len() < 16 << 20, "a few requests are not answered with {} bytes", said.len());
    match raw.end().await {
        Ok(()) => "success".to_owned(),
        Err(error) => {
            assert!(error.to_string().contains("the script"), "{error:?}");
            error.to_string()
        }
    }
}

/// How the session ends with a client that says these bytes.
pub fn ended(bytes: &[u8]) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(session(bytes))
}

/// What a client says that negotiates by these options and goes on with `tail`.
pub fn negotiation<'a>(options: impl IntoIterator<Item = (u32, &'a [u8])>, tail: &[u8]) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(options.into_iter().flat_map(|(option, payload)| option_bytes(option, payload)));
    bytes.extend(tail);
    bytes
}
