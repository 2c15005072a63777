//! `vmbackup repo info`: what a repository is.

use std::fmt::Write;

use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::table::Table;
use crate::cli::text;
use crate::error::Result;
use crate::job::keys::{self, Info};
use crate::units::ByteSize;

/// Show what a repository is and what opens it
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let info = context
        .unlock(&args.repository, async |location, given| {
            keys::info(location, given, &context.env).await
        })
        .await?;
    context.output.document("repo-info", &info, |info| describe(info, context))
}

fn describe(info: &Info, context: &Context) -> String {
    let mut out = format!(
        "repository  {}\nlocation    {}\nmade        {}\nchunks      {}\n",
        info.id,
        info.location.display(),
        text::time(info.created, &context.env.zone),
        ByteSize(info.chunk_bytes),
    );
    if !info.has_key {
        out.push_str("key         none: whoever can read the directory can read the backups\n");
        return out;
    }
    let mut table = Table::new(&["key", "kind", "added"]);
    for key in &info.keys {
        let added = text::time(key.created, &context.env.zone);
        table.row([key.id.clone(), key.kind_name().to_owned(), added]);
    }
    let _ = write!(out, "\n{}", table.render());
    out
}
