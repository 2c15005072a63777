//! Any command line of `vmbackup copy`, taken apart: shared by the bounded run of `fuzz.rs` and by the
//! coverage-guided one in `fuzz/`.

use std::fmt::Write as _;

use clap::Parser;

use super::{options, refuse_without_effect, source, target};
use crate::cli::commands::copy::Args;
use crate::error::{Error, Kind};

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Alone {
    #[command(flatten)]
    args: Args,
}

/// A way to end, without what differs from input to input.
fn name(error: &Error) -> String {
    let words = error.to_string();
    // What comes before the colon, or is quoted, is the input's.
    let words = words.rsplit(": ").next().unwrap_or_default();
    let words = words.split('\'').next().unwrap_or_default();
    let words = words.split(|c: char| !c.is_ascii_lowercase()).filter(|word| word.len() > 2);
    let mut name = format!("{:?}", error.kind());
    for word in words.take(3) {
        let _ = write!(name, " {word}");
    }
    name
}

/// Takes a command line apart as `vmbackup copy` does; how that ended.
pub(crate) fn ended(line: &[String]) -> String {
    let args = match Alone::try_parse_from(line) {
        Ok(alone) => alone.args,
        Err(error) => return format!("clap {:?}", error.kind()),
    };
    let taken = source(&args.source).and_then(|from| {
        let to = target(&args)?;
        refuse_without_effect(&args, &from, &to)?;
        let options = options(&args)?;
        // What the engine relies on.
        let fits = |bytes: u64| bytes.is_power_of_two() && (4096..=32 << 20).contains(&bytes);
        assert!(options.request_bytes.is_none_or(fits), "{line:?}");
        assert!(options.rate_bytes != Some(0) && options.requests != Some(0), "{line:?}");
        Ok(format!("{:.4} to {:.4}", format!("{from:?}"), format!("{to:?}")))
    });
    taken.unwrap_or_else(|error| {
        assert!(
            [Kind::Usage, Kind::Unsupported, Kind::NotFound].contains(&error.kind()),
            "{line:?}: {error:?}"
        );
        assert!(
            !error.to_string().is_empty() && error.hint_text().is_some_and(|h| !h.is_empty())
                || error.kind() != Kind::Usage
                || error.to_string().contains('\''),
            "{error:?}"
        );
        name(&error)
    })
}
