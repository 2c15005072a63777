//! The writing side of a connection: batches what is queued into few system calls.

use std::io::IoSlice;
use std::sync::atomic::Ordering;

use tokio::io::AsyncWriteExt;

use super::connection::{Next, Outgoing, Shared, goodbye};
use super::error::{NbdError, lost};
use super::stream::WriteHalf;
use super::wire::{Request, command};

/// Requests written at once: their headers and payloads make one vectored write.
const BATCH_MAX: usize = 16;

/// Writes requests until the connection is closed or breaks; records why before it returns.
pub(super) async fn run(shared: &Shared, mut half: WriteHalf) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    let mut headers = Vec::new();
    loop {
        match shared.next_batch(&mut batch, BATCH_MAX) {
            Next::Wait => shared.work.notified().await,
            Next::Batch => {
                if let Err(reason) = send(shared, &mut half, &mut batch, &mut headers).await {
                    return shared.kill(reason);
                }
            }
            Next::Goodbye => {
                return goodbye(shared, async {
                    let header =
                        Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, len: 0 };
                    headers.clear();
                    header.encode(shared.style, &mut headers);
                    if half.write_all(&headers).await.is_ok() {
                        let _ = half.shutdown().await;
                    }
                })
                .await;
            }
        }
    }
}

/// Sends a batch; the payloads' buffers are free again when it returns.
async fn send(
    shared: &Shared,
    half: &mut WriteHalf,
    batch: &mut Vec<Outgoing>,
    headers: &mut Vec<u8>,
) -> Result<(), NbdError> {
    headers.clear();
    let mut ends = Vec::with_capacity(BATCH_MAX);
    for outgoing in batch.iter() {
        outgoing.header.encode(shared.style, headers);
        ends.push(headers.len());
    }
    let mut slices = Vec::with_capacity(2 * BATCH_MAX);
    let mut start = 0;
    for (outgoing, end) in batch.iter().zip(ends) {
        if let Some((buffer, at)) = &outgoing.payload {
            slices.push(IoSlice::new(&headers[start..end]));
            slices.push(IoSlice::new(&buffer[at.clone()]));
            start = end;
        }
    }
    // Headers without payload lie side by side: one slice for all that follow the last payload.
    slices.push(IoSlice::new(&headers[start..]));
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        let written = half.write_vectored(rest).await.map_err(|e| lost(&shared.peer, e))?;
        if written == 0 {
            return Err(lost(&shared.peer, std::io::ErrorKind::WriteZero.into()));
        }
        shared.moved_bytes.fetch_add(written as u64, Ordering::Relaxed);
        IoSlice::advance_slices(&mut rest, written);
    }
    half.flush().await.map_err(|e| lost(&shared.peer, e))?;
    batch.clear();
    Ok(())
}
