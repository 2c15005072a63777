//! In the place of `domain` in a program built without libvirt: says so.

use std::convert::Infallible;
use std::path::PathBuf;

use super::outcome::Outcome;
use super::problems::Problems;
use super::{Define, Domain, Place, Request, preview};
use crate::error::{Error, Kind, Result};
use crate::journal::RestoreJournal;
use crate::repo::{Manifest, Repository};
use crate::vm::Uuid;

/// Never made.
pub(super) struct Prepared(Infallible);

/// Says so.
#[expect(clippy::unused_async, reason = "the same signature as with libvirt")]
pub(super) async fn prepare(
    _: (&Repository, &Manifest),
    _: &[(String, Place)],
    _: (&Request, &Define),
    problems: &mut Problems,
) -> Option<Prepared> {
    let error = Error::new(Kind::Unsupported, "this program was built without libvirt");
    problems
        .add(error.hint(
            "build it with the cargo feature 'libvirt', or restore the images with --to DIR",
        ));
    None
}

/// Not known: another program defined it.
#[expect(clippy::unused_async, reason = "the same signature as with libvirt")]
pub(super) async fn definition(_: &str, _: Uuid) -> Result<Option<String>> {
    Err(Error::new(Kind::Unsupported, "this program was built without libvirt"))
}

#[expect(clippy::unused_async, reason = "the same signatures as with libvirt")]
impl Prepared {
    /// Never called.
    pub(super) async fn check(&self) -> Result<()> {
        match self.0 {}
    }

    /// Never called.
    pub(super) fn preview(&self, _: &Define) -> preview::Domain {
        match self.0 {}
    }

    /// Never called.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        match self.0 {}
    }

    /// Never called.
    pub(super) async fn define(
        &self,
        _: &mut Outcome,
        _: &mut RestoreJournal,
    ) -> Result<Vec<PathBuf>> {
        match self.0 {}
    }

    /// Never called.
    pub(super) async fn start(self) -> Result<Domain> {
        match self.0 {}
    }
}
