//! The NBD wire format: numbers and the fixed-size headers, nothing else.
//!
//! Everything is big-endian. Names follow `doc/proto.md` of the NBD project with the `NBD_` prefix
//! dropped; extended headers are the `extension-ext-header` branch of it, as QEMU 8.2 and
//! libnbd 1.18 speak them. No I/O here, so that client, server and fuzzers share it.

/// First eight bytes of every server ("NBDMAGIC").
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Second magic of an oldstyle server.
pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// Second magic of a newstyle server ("IHAVEOPT"), and first of every option of a client.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Magic of an option reply.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub const REQUEST: u32 = 0x2560_9513;
/// Magic of a request with an extended header.
pub const REQUEST_EXTENDED: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub const REPLY_SIMPLE: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const REPLY_STRUCTURED: u32 = 0x668e_33ef;
/// Magic of a reply chunk with an extended header.
pub const REPLY_EXTENDED: u32 = 0x6e8a_278c;

/// Longest string either side may send.
pub const STRING_BYTES_MAX: usize = 4096;
/// Payload everybody must take when no block sizes were negotiated.
pub const PAYLOAD_BYTES_DEFAULT: u64 = 32 << 20;
/// Largest minimum block size a server may ask for.
pub const BLOCK_BYTES_MIN_MAX: u32 = 64 << 10;
/// Zero bytes after the export's data in oldstyle, and after EXPORT_NAME without NO_ZEROES.
pub const PADDING_BYTES: usize = 124;

/// Handshake flags of the server, and their echo by the client.
pub mod handshake {
    /// Options get replies.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No padding after EXPORT_NAME.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of the client.
pub mod option {
    /// Enter transmission without any reply but the export's data.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Continue in TLS.
    pub const STARTTLS: u32 = 5;
    /// What GO would say.
    pub const INFO: u32 = 6;
    /// Enter transmission.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which meta contexts exist.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose the meta contexts of BLOCK_STATUS.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit requests and replies.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information.
    pub const INFO: u32 = 3;
    /// One meta context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known.
    pub const UNSUP: u32 = ERROR_BIT | 1;
    /// The option is not allowed.
    pub const POLICY: u32 = ERROR_BIT | 2;
    /// The option is malformed.
    pub const INVALID: u32 = ERROR_BIT | 3;
    /// The server's platform lacks it.
    pub const PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS first.
    pub const TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going away.
    pub const SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for block sizes.
    pub const BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// The option is too long.
    pub const TOO_BIG: u32 = ERROR_BIT | 9;
    /// The client must ask for extended headers.
    pub const EXT_HEADER_REQD: u32 = ERROR_BIT | 0xa;
}

/// Items of an INFO reply.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export {
    /// The other flags mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// No writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag of READ works.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// The medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// CACHE works.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload that names contexts (extended headers only).
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read data.
    pub const READ: u16 = 0;
    /// Write data.
    pub const WRITE: u16 = 1;
    /// End the session; has no reply.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// The content does not matter any more.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Query meta contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod command_flag {
    /// On stable storage before the reply.
    pub const FUA: u16 = 1;
    /// Zeroes must stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The data of a READ in one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent per context is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zero only if that is faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The request has a payload (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of structured and extended replies.
pub mod chunk {
    /// Flag: the reply is complete.
    pub const DONE: u16 = 1;
    /// Nothing but the header.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context id and 32-bit extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Context id, count and 64-bit extents.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error chunk.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// Error number and message.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// Error number, message and offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Error numbers on the wire: those of Linux, whatever the platforms are.
pub mod errno {
    /// Not allowed.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// The request is wrong.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// The request is too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported (or not fast).
    pub const ENOTSUP: u32 = 95;
    /// The server is going away.
    pub const ESHUTDOWN: u32 = 108;
}

/// `base:allocation`: the range is not allocated.
pub const STATE_HOLE: u64 = 1;
/// `base:allocation`: the range reads as zeroes; the only promise that licenses not reading it.
pub const STATE_ZERO: u64 = 2;
/// What QEMU puts before the name of a dirty bitmap (`docs/interop/nbd.rst`).
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";
/// `qemu:dirty-bitmap:*`: the range was written (QEMU `docs/interop/nbd.rst`).
pub const STATE_DIRTY: u64 = 1;

/// Whether headers have 32-bit or 64-bit lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderStyle {
    /// Requests of 28 bytes; replies are simple.
    Simple,
    /// Requests of 28 bytes; replies of 20-byte chunks (simple ones where there is no payload).
    Structured,
    /// Requests of 32 bytes, replies of 32-byte chunks.
    Extended,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// What the reply must echo.
    pub cookie: u64,
    /// Where on the disk.
    pub offset: u64,
    /// How much of it.
    pub len: u64,
}

impl Request {
    /// Bytes of a request's header.
    pub fn header_bytes(style: HeaderStyle) -> usize {
        if style == HeaderStyle::Extended { 32 } else { 28 }
    }

    /// Reads a header; the magic if it is the wrong one.
    ///
    /// # Panics
    /// When `bytes` is shorter than [`Request::header_bytes`].
    pub fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<Self, u32> {
        let extended = style == HeaderStyle::Extended;
        let magic = be32(&bytes[..4]);
        if magic != if extended { REQUEST_EXTENDED } else { REQUEST } {
            return Err(magic);
        }
        let len = if extended { be64(&bytes[24..32]) } else { be32(&bytes[24..28]).into() };
        Ok(Self {
            flags: be16(&bytes[4..6]),
            command: be16(&bytes[6..8]),
            cookie: be64(&bytes[8..16]),
            offset: be64(&bytes[16..24]),
            len,
        })
    }

    /// Appends the header to `out`.
    ///
    /// # Panics
    /// When a length does not fit the style: requests are split before they come here.
    pub fn encode(&self, style: HeaderStyle, out: &mut Vec<u8>) {
        let extended = style == HeaderStyle::Extended;
        let magic = if extended { REQUEST_EXTENDED } else { REQUEST };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.len.to_be_bytes());
        } else {
            let len = u32::try_from(self.len).expect("requests are split below 4 GiB");
            out.extend_from_slice(&len.to_be_bytes());
        }
    }
}

/// The header of a reply (or of a chunk of one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply: complete, with the data of a READ following if `error` is 0.
    Simple {
        /// Error number, 0 for success.
        error: u32,
        /// Of the request.
        cookie: u64,
    },
    /// A chunk.
    Chunk {
        /// [`chunk::DONE`].
        flags: u16,
        /// What it is.
        kind: u16,
        /// Of the request.
        cookie: u64,
        /// The request's offset (extended headers only).
        offset: Option<u64>,
        /// Payload that follows.
        len: u64,
    },
}

impl ReplyHeader {
    /// Bytes after the magic for a magic that is legal in `style`.
    pub fn rest_len(magic: u32, style: HeaderStyle) -> Option<usize> {
        match (magic, style) {
            (REPLY_SIMPLE, HeaderStyle::Simple | HeaderStyle::Structured) => Some(12),
            (REPLY_STRUCTURED, HeaderStyle::Structured) => Some(16),
            (REPLY_EXTENDED, HeaderStyle::Extended) => Some(28),
            _ => None,
        }
    }

    /// Reads what follows the magic.
    ///
    /// # Panics
    /// When `rest` is shorter than [`ReplyHeader::rest_len`] said.
    pub fn decode(magic: u32, rest: &[u8]) -> Self {
        if magic == REPLY_SIMPLE {
            return Self::Simple { error: be32(&rest[..4]), cookie: be64(&rest[4..12]) };
        }
        let (flags, kind, cookie) = (be16(&rest[..2]), be16(&rest[2..4]), be64(&rest[4..12]));
        if magic == REPLY_EXTENDED {
            let offset = Some(be64(&rest[12..20]));
            Self::Chunk { flags, kind, cookie, offset, len: be64(&rest[20..28]) }
        } else {
            Self::Chunk { flags, kind, cookie, offset: None, len: u64::from(be32(&rest[12..16])) }
        }
    }
}

/// The big-endian number in these two bytes.
///
/// # Panics
/// When there are not exactly two; likewise [`be32`] and [`be64`].
pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes.try_into().expect("two bytes"))
}

/// The big-endian number in these four bytes.
pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}

/// The big-endian number in these eight bytes.
pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
}

/// Text of a peer as it may be shown: valid UTF-8 without control characters, so that no server
/// can drive the terminal of whoever reads the message.
pub fn peer_text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_the_documented_letters() {
        assert_eq!(&GREETING.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&IHAVEOPT.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn a_request_has_28_bytes_and_an_extended_one_32() {
        let request = Request { flags: 1, command: 7, cookie: 2, offset: 3, len: 4 };
        let mut out = Vec::new();
        request.encode(HeaderStyle::Structured, &mut out);
        assert_eq!(out.len(), 28);
        assert_eq!(be32(&out[24..]), 4);
        assert_eq!(Request::decode(HeaderStyle::Structured, &out), Ok(request));
        assert_eq!(Request::decode(HeaderStyle::Extended, &out), Err(REQUEST));
        out.clear();
        request.encode(HeaderStyle::Extended, &mut out);
        assert_eq!((out.len(), be32(&out[..4])), (32, REQUEST_EXTENDED));
        assert_eq!(Request::decode(HeaderStyle::Extended, &out), Ok(request));
    }

    #[test]
    fn a_reply_of_the_wrong_style_has_no_length() {
        assert_eq!(ReplyHeader::rest_len(REPLY_SIMPLE, HeaderStyle::Extended), None);
        assert_eq!(ReplyHeader::rest_len(REPLY_STRUCTURED, HeaderStyle::Simple), None);
        assert_eq!(ReplyHeader::rest_len(REPLY_EXTENDED, HeaderStyle::Structured), None);
    }
}
