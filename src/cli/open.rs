//! The way from arguments to an open repository.

use super::args::RepositoryArgs;
use super::context::{self, Context, Purpose};
use super::settings;
use crate::error::Result;
use crate::job::{self, Credentials, Repository, RepositoryChoice};

impl Context {
    /// Opens the repository that is named, which has to be there.
    pub(crate) async fn open(&self, args: &RepositoryArgs) -> Result<Repository> {
        self.unlock(args, async |location, given| job::open(location, given, &self.env).await).await
    }

    /// Opens the repository a backup goes into; makes the default one on first use.
    pub(crate) async fn open_for_backup(&self, args: &RepositoryArgs) -> Result<Repository> {
        if let RepositoryChoice::Default(path) = settings::repository(args, &self.paths)? {
            let keys =
                settings::repository_key(args.password_file.as_ref(), args.key_file.as_ref());
            let given = context::secret(&keys, Purpose::Opens, &self.control)
                .await?
                .unwrap_or(Credentials::None);
            job::keys::make_default(&path, &given, (&self.env, &self.control)).await?;
        }
        self.open(args).await
    }

    /// Opens the repository a backup would go into; `None` when that is the default one and it has
    /// not been made yet.
    pub(crate) async fn open_if_made(&self, args: &RepositoryArgs) -> Result<Option<Repository>> {
        match settings::repository(args, &self.paths)? {
            RepositoryChoice::Default(path) if !path.exists() => Ok(None),
            _ => self.open(args).await.map(Some),
        }
    }
}
