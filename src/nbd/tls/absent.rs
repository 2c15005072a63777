//! TLS in a program that was built without it: every use is an error.

use std::convert::Infallible;

use super::{ClientTls, Secured, ServerTlsOptions};
use crate::error::{Error, Kind, Result};
use crate::nbd::stream::Stream;

#[derive(Clone)]
pub(super) struct Acceptor(Infallible);

impl Acceptor {
    pub(super) fn load(_options: &ServerTlsOptions) -> Result<Self> {
        Err(absent())
    }

    #[allow(clippy::unused_async)] // what the other one is
    pub(super) async fn accept(&self, _stream: Box<dyn Stream>, _peer: &str) -> Result<Secured> {
        match self.0 {}
    }
}

#[allow(clippy::unused_async)] // what the other one is
pub(super) async fn connect(
    _tls: &ClientTls,
    _stream: Box<dyn Stream>,
    _peer: &str,
    _name: Option<&str>,
) -> Result<Secured> {
    Err(absent())
}

fn absent() -> Error {
    Error::new(Kind::Unsupported, "this program was built without TLS")
        .hint("build it with the cargo feature 'tls', or reach the server through ssh")
}
