//! Looking for damage in a repository, and saying what it affects; the repository does the work.

use super::Repository;
use crate::control::Control;
use crate::error::Result;
pub use crate::repo::check::{
    AffectedDisk, AffectedRange, CheckOptions, CheckReport, Damage, Depth, Repair,
};

/// Checks the repository. Damage is in the report, not an error.
pub async fn run(
    repository: &Repository,
    options: CheckOptions,
    control: &Control,
) -> Result<CheckReport> {
    repository.check(options, control).await
}
