//! Some bytes of an export, to be looked at.

use serde::{Serialize, Serializer};

use crate::block::{BlockSource, Buffer, ByteRange};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::nbd::{Client, ClientOptions, NbdUri};

/// Most bytes read: what is longer is copied, not looked at.
const BYTES_MAX: u64 = 64 << 20;

/// Some bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The export.
    pub uri: String,
    /// Where the bytes begin.
    pub offset: u64,
    /// The bytes; as hexadecimal digits in JSON.
    #[serde(serialize_with = "hex")]
    pub data: Vec<u8>,
}

fn hex<S: Serializer>(bytes: &[u8], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    let digits = |byte: &u8| {
        let digit = |n: u8| char::from_digit(u32::from(n), 16).expect("a nibble");
        [digit(byte >> 4), digit(byte & 15)]
    };
    serializer.serialize_str(&bytes.iter().flat_map(digits).collect::<String>())
}

/// Reads `len` bytes from `offset` on, or as many as there are.
pub async fn run(uri: &NbdUri, offset: u64, len: u64, control: &Control) -> Result<Report> {
    if len > BYTES_MAX {
        let message = format!("{len} bytes are more than can be shown ({BYTES_MAX})");
        return Err(Error::new(Kind::Usage, message).hint("copy the export instead"));
    }
    control
        .run(async {
            let client = Box::pin(Client::open_uri(uri, ClientOptions::default())).await?;
            let geometry = BlockSource::geometry(&client);
            let range = geometry.range();
            if offset > range.end() {
                let message = format!("{offset} is past the end of {uri} at {}", range.end());
                return Err(Error::new(Kind::Usage, message));
            }
            let wanted = ByteRange::new(offset, len.min(range.end() - offset));
            let wide = wanted.widen(geometry.align_bytes, range.end());
            let index = |n: u64| usize::try_from(n).expect("at most 64 MiB");
            let buffer = Buffer::unbudgeted(vec![0; index(wide.len())]);
            let buffer = client.read(wide.offset(), buffer).await?;
            let from = index(offset - wide.offset());
            let data = buffer[from..from + index(wanted.len())].to_vec();
            Ok(Report { uri: uri.to_string(), offset, data })
        })
        .await
}
