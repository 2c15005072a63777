//! What the arguments of a copy mean.

use std::os::fd::AsFd;
use std::time::Duration;

use super::commands::copy::{Args, SpeedArgs};
use super::settings;
use crate::error::{Error, Kind, Result};
use crate::job::copy::{
    Before, Compression, Flush, OnExisting, Options, REQUEST_BYTES_MAX, Retries, Source, Target,
    Verify, Zeroes,
};
use crate::job::source::DiskSpec;
use crate::units::{ByteSize, KIB};

/// Smallest request: nbdcopy's, too.
const REQUEST_BYTES_MIN: u64 = 4 * KIB;

/// Shortest run of zeroes that is looked for: the block of most file systems.
const DETECT_BYTES: u64 = 4 * KIB;

/// A source, or what it takes a repository to make one of.
#[derive(Debug)]
pub(crate) enum SourceEnd {
    /// Needs nothing more.
    Ready(Source),
    /// A disk of a restore point.
    Point { point: String, disk: Option<String> },
}

/// What both ends may be.
enum End {
    Pipe,
    Null,
    Command(Vec<String>),
    Point { point: String, disk: Option<String> },
    Disk(DiskSpec),
}

fn end(text: &str) -> Result<End> {
    if text == "-" {
        return Ok(End::Pipe);
    }
    if text == "null:" {
        return Ok(End::Null);
    }
    if let Some(line) = text.trim().strip_prefix('[') {
        return command(line, text).map(End::Command);
    }
    if let Some(name) = text.strip_prefix("point:") {
        let (point, disk) = match name.rsplit_once('/') {
            Some((point, disk)) => (point, Some(disk.to_owned())),
            None => (name, None),
        };
        return Ok(End::Point { point: point.to_owned(), disk });
    }
    let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    if let Some(scheme) =
        scheme.filter(|scheme| !scheme.starts_with("nbd") && !scheme.contains('/'))
    {
        let message = format!("{scheme}:// is not opened by vmbackup itself");
        return Err(Error::new(Kind::Unsupported, message)
            .hint(format!("let nbdkit do it: '[ nbdkit curl {text} ]'")));
    }
    settings::disk(text).map(End::Disk)
}

/// Where the bytes come from.
pub(crate) fn source(text: &str) -> Result<SourceEnd> {
    Ok(match end(text)? {
        End::Pipe => {
            let input = std::io::stdin().as_fd().try_clone_to_owned();
            let input = input.map_err(|e| Error::io("cannot open standard input", e))?;
            SourceEnd::Ready(Source::Pipe(input.into()))
        }
        End::Null => {
            let message = "null: has nothing to copy";
            return Err(Error::new(Kind::Usage, message).hint("make an empty image with qemu-img"));
        }
        End::Command(line) => SourceEnd::Ready(Source::Command(line)),
        End::Point { point, disk } => SourceEnd::Point { point, disk },
        End::Disk(disk) => SourceEnd::Ready(Source::Disk(disk)),
    })
}

/// Where they go.
pub(crate) fn target(args: &Args) -> Result<Target> {
    Ok(match end(&args.target)? {
        End::Pipe => {
            let output = std::io::stdout().as_fd().try_clone_to_owned();
            let output = output.map_err(|e| Error::io("cannot open standard output", e))?;
            Target::Pipe(output.into())
        }
        End::Null => Target::Null,
        End::Command(line) => Target::Command(line),
        End::Disk(DiskSpec::Nbd(uri)) => Target::Nbd(uri),
        End::Disk(DiskSpec::Image(image)) => Target::Image {
            image,
            existing: match &args.place {
                place if place.in_place => OnExisting::WriteInPlace,
                place if place.force => OnExisting::Replace,
                _ => OnExisting::Refuse,
            },
            compression: if args.place.compressed {
                Compression::Clusters
            } else {
                Compression::None
            },
        },
        End::Point { .. } => {
            let message = "points are made by backups only";
            return Err(Error::new(Kind::Usage, message)
                .hint("copy to an image, and back that up with 'vmbackup full --image'"));
        }
    })
}

/// How to copy.
pub(crate) fn options(args: &Args) -> Result<Options> {
    let (place, zeroes, speed) = (&args.place, &args.zeroes, &args.speed);
    let request_bytes = size("--request-size", speed.request_size.as_ref())?;
    let fits = |bytes: u64| {
        bytes.is_power_of_two() && (REQUEST_BYTES_MIN..=REQUEST_BYTES_MAX).contains(&bytes)
    };
    if let Some(bytes) = request_bytes.filter(|bytes| !fits(*bytes)) {
        let message = format!("--request-size: {bytes} is not a power of two from 4k to 32M");
        return Err(Error::new(Kind::Usage, message).hint("256k and 1M are good for most storage"));
    }
    let detect_bytes = size("--sparse", zeroes.sparse.as_ref())?.unwrap_or(DETECT_BYTES);
    let detect_bytes = Some(detect_bytes).filter(|bytes| *bytes > 0);
    if let Some(bytes) = detect_bytes.filter(|bytes| !bytes.is_power_of_two()) {
        let message = format!("--sparse: {bytes} is not a power of two");
        return Err(Error::new(Kind::Usage, message).hint("4k is the block of most file systems"));
    }
    let request_max = request_bytes.unwrap_or(REQUEST_BYTES_MAX);
    if let Some(bytes) = detect_bytes.filter(|bytes| *bytes > request_max) {
        // Zeroes are looked for in what one request brings.
        let message = format!("--sparse: {bytes} bytes are more than those of a request");
        return Err(Error::new(Kind::Usage, message).hint(if request_bytes.is_some() {
            "look for shorter runs, or make requests larger with --request-size"
        } else {
            "32M is the most"
        }));
    }
    let (connections, requests) = match speed {
        SpeedArgs { synchronous: true, .. } => (Some(1), Some(1)),
        SpeedArgs { connections, requests, .. } => (connections.map(usize::from), *requests),
    };
    let queue_bytes = size("--queue-size", speed.queue_size.as_ref())?;
    Ok(Options {
        connections,
        requests,
        request_bytes,
        queue_bytes: queue_bytes.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
        zeroes: if zeroes.allocated { Zeroes::Allocated } else { Zeroes::Sparse { detect_bytes } },
        before: if zeroes.destination_is_zero { Before::Zero } else { Before::Unknown },
        target_bytes: size("--target-size", place.target_size.as_ref())?,
        flush: match &place.end {
            end if end.flush => Flush::Require,
            end if end.no_flush => Flush::Never,
            _ => Flush::Try,
        },
        rate_bytes: rate(speed.rate_limit.as_ref())?,
        verify: if place.end.verify { Verify::ReadBack } else { Verify::No },
        retries: Retries {
            attempts: speed.retry.retries,
            delay: Duration::from_secs(speed.retry.retry_delay.into()),
        },
    })
}

/// Fails when an option was given that would change nothing: whoever gave it expects that it does.
/// Options of speed may, with an end that has no use for them.
pub(crate) fn refuse_without_effect(
    args: &Args,
    source: &SourceEnd,
    target: &Target,
) -> Result<()> {
    let Args { place, zeroes, speed, .. } = args;
    let lost = matches!(target, Target::Pipe(_) | Target::Null);
    let image = matches!(target, Target::Image { .. });
    let file =
        matches!(target, Target::Image { image, .. } if !crate::image::is_device(&image.path));
    let uri = matches!(target, Target::Nbd(_))
        || matches!(source, SourceEnd::Ready(Source::Disk(DiskSpec::Nbd(_))));
    let goes_on = "it is written in place";
    let passes = "what it gets is not kept by vmbackup";
    let compress = "copy to a new qcow2 file with --compressed, then that file to where it belongs";
    for (given, option, why, hint) in [
        (place.compressed && !image, "--compressed", "it is no new image", compress),
        (place.force && !file && !lost, "--force", goes_on, ""),
        (place.force && lost, "--force", passes, ""),
        (place.in_place && lost, "--in-place", passes, ""),
        (place.end.flush && lost, "--flush", passes, ""),
        (zeroes.allocated && lost, "--allocated", passes, ""),
        (zeroes.sparse.is_some() && lost, "--sparse", passes, ""),
        (zeroes.destination_is_zero && lost, "--destination-is-zero", passes, ""),
        (speed.retry.retries > 0 && !uri, "--retries", "neither end is an NBD URI", ""),
    ] {
        if given {
            let message = format!("{option} has no effect on {}: {why}", args.target);
            let leave_out = format!("leave out {option}");
            let hint = if hint.is_empty() { &leave_out } else { hint };
            return Err(Error::new(Kind::Usage, message).hint(hint));
        }
    }
    Ok(())
}

/// `--rate-limit`, bytes per second.
fn rate(text: Option<&String>) -> Result<Option<u64>> {
    let rate_bytes = size("--rate-limit", text)?;
    if rate_bytes == Some(0) {
        return Err(Error::new(Kind::Usage, "--rate-limit: nothing would ever be copied")
            .hint("leave it out for no limit"));
    }
    Ok(rate_bytes)
}

/// Fails when standard output would get two things.
pub(crate) fn refuse_mixed_output(to_pipe: bool, json: bool) -> Result<()> {
    if to_pipe && json {
        let message = "standard output cannot hold both the disk and a JSON document";
        return Err(Error::new(Kind::Usage, message).hint("leave out --json"));
    }
    Ok(())
}

fn size(option: &str, text: Option<&String>) -> Result<Option<u64>> {
    let Some(text) = text else { return Ok(None) };
    let size = text.parse::<ByteSize>().map_err(|e| e.context(format!("{option}: not a size")))?;
    Ok(Some(size.0))
}

/// The words between brackets; quotes hold a word together and a backslash takes the next character
/// as it is, as in a shell. Nothing is expanded.
fn command(after_bracket: &str, text: &str) -> Result<Vec<String>> {
    let bad = |why: &str| {
        Error::new(Kind::Usage, format!("in {text}: {why}"))
            .hint("write the command line as '[ nbdkit curl https://… ]'")
    };
    let inner = after_bracket.trim_end().strip_suffix(']').ok_or_else(|| bad("no closing ]"))?;
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = inner.chars();
    while let Some(char) = chars.next() {
        match (char, quote) {
            (char, Some(mark)) if char == mark => quote = None,
            ('\\', None | Some('"')) => {
                let next = chars.next().ok_or_else(|| bad("a backslash at the end"))?;
                word.get_or_insert_default().push(next);
            }
            ('"' | '\'', None) => {
                quote = Some(char);
                word.get_or_insert_default();
            }
            (char, None) if char.is_whitespace() => words.extend(word.take()),
            (char, _) => word.get_or_insert_default().push(char),
        }
    }
    if quote.is_some() {
        return Err(bad("a quote is not closed"));
    }
    words.extend(word);
    if words.is_empty() { Err(bad("no command")) } else { Ok(words) }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod entry;
#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_cut_into_words_as_a_shell_does() {
        for (text, words) in [
            ("[ nbdkit null ]", vec!["nbdkit", "null"]),
            ("[nbdkit null 1M]", vec!["nbdkit", "null", "1M"]),
            (r#"[ a 'b c' "d 'e" f\ g '' ]"#, vec!["a", "b c", "d 'e", "f g", ""]),
        ] {
            assert!(matches!(end(text).unwrap(), End::Command(found) if found == words), "{text}");
        }
        for text in ["[ nbdkit", "[ ]", "[ 'a ]", "[ a \\]"] {
            assert_eq!(end(text).err().unwrap().kind(), Kind::Usage, "{text}");
        }
    }

    #[test]
    fn ends_are_told_apart_by_their_beginning() {
        assert!(matches!(end("-").unwrap(), End::Pipe));
        assert!(matches!(end("null:").unwrap(), End::Null));
        assert!(matches!(end("nbd://h/x").unwrap(), End::Disk(DiskSpec::Nbd(_))));
        assert!(matches!(end("qcow2:x.img").unwrap(), End::Disk(DiskSpec::Image(_))));
        let End::Point { point, disk } = end("point:foo@latest/vda").unwrap() else { panic!() };
        assert_eq!((point.as_str(), disk.as_deref()), ("foo@latest", Some("vda")));
        assert!(matches!(end("point:5634b98b").unwrap(), End::Point { disk: None, .. }));
        assert_eq!(end("https://h/x.img").err().unwrap().kind(), Kind::Unsupported);
        assert_eq!(end("x.img").err().unwrap().kind(), Kind::Usage);
    }
}
