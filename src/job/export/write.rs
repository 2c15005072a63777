//! Changing some bytes of an export, by hand.
//!
//! For tests and repairs: what is longer than [`BYTES_MAX`] is copied. Ranges must lie within the
//! export. Bytes may be written anywhere: the rest of their blocks is read and written back, and a
//! change of it by somebody else in between is lost. Zeroes and trims begin and end on blocks.

use serde::Serialize;

use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::nbd::{Access, Client, ClientOptions, Durable, InitialContent, NbdUri, Order};

/// Most bytes written as data.
pub const BYTES_MAX: u64 = 64 << 20;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Write these bytes at this offset.
    Write(u64, Vec<u8>),
    /// Make a range zero.
    Zero(ByteRange, ZeroMode),
    /// Give a range up.
    Trim(ByteRange),
    /// Make durable what was written.
    Flush,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The export.
    pub uri: String,
    /// Where; 0 for a flush.
    pub offset: u64,
    /// How much; 0 for a flush.
    pub bytes: u64,
    /// Whether it is durable.
    pub durable: bool,
}

/// Does it. On an error a part may have been done.
pub async fn run(
    uri: &NbdUri,
    change: Change,
    durable: Durable,
    control: &Control,
) -> Result<Report> {
    control
        .run(async {
            // One connection: there is one thing to do.
            let access = Access::Write(InitialContent::Unknown);
            let options = ClientOptions { access, connections: 1, ..ClientOptions::default() };
            let client = Box::pin(Client::open_uri(uri, options)).await?;
            let range = match &change {
                Change::Write(offset, bytes) => checked(*offset, bytes.len() as u64)?,
                Change::Zero(range, _) | Change::Trim(range) => *range,
                Change::Flush => ByteRange::new(0, 0),
            };
            check(range, &client, uri)?;
            if !matches!(change, Change::Write(..)) {
                check_blocks(range, &client, uri)?;
            }
            let order = match change {
                Change::Write(offset, bytes) => {
                    let (offset, bytes) = whole_blocks(&client, offset, bytes).await?;
                    Some(Order::Write(offset, Buffer::unbudgeted(bytes)))
                }
                Change::Zero(range, mode) => Some(Order::Zero(range, mode)),
                Change::Trim(range) => Some(Order::Trim(range)),
                Change::Flush => None,
            };
            let durable = if let Some(order) = order {
                client.order(order, durable).await?;
                durable == Durable::Yes
            } else {
                client.flush().await?;
                true
            };
            let (offset, bytes) = (range.offset(), range.len());
            Ok(Report { uri: uri.to_string(), offset, bytes, durable })
        })
        .await
}

/// The range, if there can be such a one.
pub fn checked(offset: u64, len: u64) -> Result<ByteRange> {
    if offset.checked_add(len).is_none() {
        let message = format!("{len} bytes at {offset} are past the end of any disk");
        return Err(Error::new(Kind::Usage, message));
    }
    Ok(ByteRange::new(offset, len))
}

fn check(range: ByteRange, client: &Client, uri: &NbdUri) -> Result<()> {
    let geometry = BlockSink::geometry(client);
    if range.end() > geometry.size_bytes {
        let message = format!("{range} of {uri} are past its end at {}", geometry.size_bytes);
        return Err(Error::new(Kind::Usage, message));
    }
    Ok(())
}

fn check_blocks(range: ByteRange, client: &Client, uri: &NbdUri) -> Result<()> {
    let geometry = BlockSink::geometry(client);
    let align_bytes = geometry.align_bytes;
    if range.widen(align_bytes, geometry.size_bytes) != range {
        let message = format!("{range} of {uri} do not begin and end on its blocks");
        return Err(Error::new(Kind::Usage, message)
            .hint(format!("offset and length must be multiples of {align_bytes}")));
    }
    Ok(())
}

/// The bytes with what there is before and behind them in their blocks.
async fn whole_blocks(client: &Client, offset: u64, bytes: Vec<u8>) -> Result<(u64, Vec<u8>)> {
    let geometry = BlockSink::geometry(client);
    let range = ByteRange::new(offset, bytes.len() as u64);
    let wide = range.widen(geometry.align_bytes, geometry.size_bytes);
    if wide == range {
        return Ok((offset, bytes));
    }
    let index = |n: u64| usize::try_from(n).expect("at most 64 MiB and two blocks");
    let all = Buffer::unbudgeted(vec![0; index(wide.len())]);
    let mut all = client.read(wide.offset(), all).await?.to_vec();
    let from = index(offset - wide.offset());
    all[from..from + bytes.len()].copy_from_slice(&bytes);
    Ok((wide.offset(), all))
}
