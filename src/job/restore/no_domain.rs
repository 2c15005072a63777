//! In the place of `domain` in a program built without libvirt: says so.

use std::convert::Infallible;
use std::path::PathBuf;

use super::{Define, Domain, Place, Request};
use crate::error::{Error, Kind, Result};
use crate::repo::{Manifest, Repository};

/// Never made.
pub(super) struct Prepared(Infallible);

/// Fails.
#[expect(clippy::unused_async, reason = "the same signature as with libvirt")]
pub(super) async fn prepare(
    _: &Repository,
    _: &Manifest,
    _: &[(String, Place)],
    _: (&Request, &Define),
) -> Result<Prepared> {
    Err(Error::new(Kind::Unsupported, "this program was built without libvirt")
        .hint("build it with the cargo feature 'libvirt', or restore the images with --to DIR"))
}

impl Prepared {
    /// Never called.
    #[expect(clippy::unused_async, reason = "the same signature as with libvirt")]
    pub(super) async fn finish(self) -> Result<(Domain, Vec<PathBuf>)> {
        match self.0 {}
    }
}
