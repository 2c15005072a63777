//! NBD: the connector to every disk that is not a local raw file.
//!
//! ```text
//!  NbdUri ─► Connector ─► Stream ─► greet ─► Handshake ─► Negotiated ─► Connection(s) ─► Client
//!  (address)              (unix,     (options: headers, contexts, GO)    (16 in flight   (BlockSource
//!                          tcp, …)                                        each)           BlockSink)
//! ```
//!
//! [`Client::open`] is the way in. The peer is not trusted: every number it sends is checked
//! before it is used, no memory is taken for a length that was not checked, a broken rule ends the
//! connection with an error that names peer and rule, and each wait has a deadline. A read is
//! complete only if the server sent every byte of it; zeroes are never made up.
//!
//! [`server`] is the other end.
//!
//! TLS ([`tls`]) is asked for first of all; what was said before it is forgotten.
//!
//! Layers inside: [`wire`] (numbers), `negotiate` (the handshake), `request` (rules of replies,
//! no I/O), `connection` with `reader`, `writer` and `patience` (one socket), `client` (the disk).
//!
//! Deliberately not here: TRIM in place of zeroes (its result is undefined, so it is sent only where
//! an operator orders it, or where a platform gives up what QEMU keeps for it), formats.

mod client;
mod commands;
mod connection;
mod error;
mod export;
mod extents;
mod initial_state;
mod inspect;
mod negotiate;
mod patience;
mod reader;
mod reconnect;
mod request;
pub mod server;
mod stream;
pub mod tls;
mod uri;
mod vsock;
pub mod wire;
mod writer;

pub use client::{Access, BASE_ALLOCATION, Client, ClientOptions, InitialContent, list};
pub use commands::{Durable, Order};
pub use error::NbdError;
pub use export::{BlockSizes, ExportInfo};
pub use initial_state::InitialState;
pub use inspect::{Described, Description, Greeting, Inspector, Runs, Told, Which, describe};
pub use negotiate::{Context, Greeted, Handshake, Listed, Negotiated, greet};
pub use patience::Timeouts;
pub use reconnect::{OnLost, ReconnectingClient, ReconnectingTarget, Retries};
pub use stream::{Connector, ReadHalf, Stream, WriteHalf};
pub use uri::{Address, NbdUri, Origin, PORT_DEFAULT};
