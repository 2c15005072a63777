//! What the arguments that name a VM, and those of a restore, mean.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::RepositoryArgs;
use super::commands::restore::{Args as RestoreArgs, FormatArg};
use super::settings::image;
use super::text::shown;
use super::vm_args::{ConnectArgs, QuiesceArg, SnapshotArgs, SourceArgs, WaitArgs};
use crate::error::{Error, Kind, Result};
use crate::job::backup::Sample;
use crate::job::lock::Wait;
use crate::job::restore::salvage::Damaged;
use crate::job::restore::{self, Define, ImageFormat, Power};
use crate::job::source::{SnapshotOptions, SourceSpec};
use crate::job::{Existing, Quiesce};

/// The system's libvirt: what a backup of a host means, also for a user who may talk to it.
const LIBVIRT_URI: &str = "qemu:///system";

/// The VM that is meant.
pub(crate) fn source(args: SourceArgs) -> Result<SourceSpec> {
    if let Some(name) = args.name.as_deref().filter(|name| has_control(name)) {
        let message = format!("--name: '{}' has control characters", shown(name));
        return Err(Error::new(Kind::Usage, message).hint("choose a name without them"));
    }
    if let Some(domain) = args.domain {
        return Ok(SourceSpec::Libvirt { uri: libvirt_uri(&args.connect), domain });
    }
    if let Some(qmp) = args.qmp {
        return Ok(SourceSpec::Qemu { qmp, agent: args.agent, name: args.name });
    }
    let images = args.image.iter().map(|text| image(text)).collect::<Result<_>>()?;
    let name = args.name.expect("the parser demands --name with --image");
    Ok(SourceSpec::Images { name, images })
}

fn has_control(name: &str) -> bool {
    name.contains(char::is_control)
}

/// The libvirt that is meant.
pub(crate) fn libvirt_uri(args: &ConnectArgs) -> String {
    args.connect.clone().filter(|uri| !uri.is_empty()).unwrap_or_else(|| LIBVIRT_URI.to_owned())
}

/// How the point in time is to be taken.
pub(crate) fn snapshot(args: SnapshotArgs) -> Result<SnapshotOptions> {
    Ok(SnapshotOptions {
        quiesce: match args.quiesce {
            QuiesceArg::Auto => Quiesce::Auto,
            QuiesceArg::Require => Quiesce::Require,
            QuiesceArg::Never => Quiesce::Never,
        },
        freeze_budget: duration("--freeze-budget", &args.freeze_budget)?,
        scratch_dir: args.scratch_dir.as_deref().map(scratch_dir).transpose()?,
        exclude_disks: args.exclude_disk,
        insecure_tcp: args.insecure_tcp,
        guest_first: args.guest_first,
    })
}

/// `--audit`, `--verify-source`.
pub(crate) fn sample(option: &str, percent: &str) -> Result<Sample> {
    let number = percent.strip_suffix('%').unwrap_or(percent).trim().parse::<f64>();
    match number {
        Ok(0.0) => Ok(Sample::None),
        Ok(number) if number > 0.0 && number <= 100.0 => Ok(Sample::Share(number / 100.0)),
        _ => Err(Error::new(Kind::Usage, format!("{option}: '{percent}' is no share"))
            .hint("give a percentage from 0 (none) to 100%, such as 0.1%")),
    }
}

/// `--wait`.
pub(crate) fn wait(args: &WaitArgs) -> Result<Wait> {
    match &args.wait {
        None => Ok(Wait::No),
        Some(text) => Ok(Wait::AtMost(duration("--wait", text)?)),
    }
}

/// libvirt and QEMU have working directories of their own.
fn scratch_dir(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::io(format!("--scratch-dir: cannot resolve '{}'", path.display()), e))
}

/// Where a restore goes.
pub(crate) fn restore(args: RestoreArgs) -> Result<(RepositoryArgs, restore::Request)> {
    if args.start && !args.define && args.as_name.is_none() {
        return Err(Error::new(Kind::Usage, "--start has no domain to start")
            .hint("add --define, or --as NAME for a new domain"));
    }
    if let Some(name) = args.as_name.as_deref().filter(|name| {
        // It becomes part of file names; libvirt itself refuses the slash.
        name.is_empty() || name.starts_with('.') || name.contains('/') || has_control(name)
    }) {
        return Err(Error::new(
            Kind::Usage,
            format!("--as: '{}' cannot be the name of a domain", shown(name)),
        )
        .hint("choose a name without '/' and control characters that does not begin with a dot"));
    }
    let define = (args.define || args.as_name.is_some()).then(|| Define {
        uri: libvirt_uri(&args.connect),
        as_name: args.as_name,
        power: if args.start { Power::On } else { Power::Off },
    });
    let devices = args.to_device.iter().map(|text| device(text)).collect::<Result<_>>()?;
    let request = restore::Request {
        point: args.point,
        disks: args.disk,
        directory: args.to,
        format: args.format.map(|format| match format {
            FormatArg::Raw => ImageFormat::Raw,
            FormatArg::Qcow2 => ImageFormat::Qcow2,
        }),
        devices,
        existing: if args.force { Existing::Replace } else { Existing::Refuse },
        define,
        damaged: if args.salvage { Damaged::Zeroes } else { Damaged::Fails },
        wait: wait(&args.wait)?,
    };
    Ok((args.repository, request))
}

/// `vda=/dev/vg/lv`.
fn device(text: &str) -> Result<(String, PathBuf)> {
    match text.split_once('=') {
        Some((disk, path)) if !disk.is_empty() && !path.is_empty() => {
            Ok((disk.to_owned(), path.into()))
        }
        _ => {
            Err(Error::new(Kind::Usage, format!("--to-device: '{text}' names no disk and device"))
                .hint("write --to-device vda=/dev/vg/lv"))
        }
    }
}

/// `10`, `10s`, `500ms`, `2m`, `1h`.
pub(crate) fn duration(option: &str, text: &str) -> Result<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    let ms = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms));
    ms.filter(|_| unit_ms > 0).map(Duration::from_millis).ok_or_else(|| {
        Error::new(Kind::Usage, format!("{option}: '{text}' is not a time"))
            .hint("write a whole number with a unit: 500ms, 10s, 2m")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_directory_is_the_same_for_whoever_uses_it() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(scratch_dir(Path::new("scratch")).unwrap(), here.join("scratch"));
        assert_eq!(scratch_dir(Path::new("/s")).unwrap(), Path::new("/s"));
        assert_eq!(scratch_dir(Path::new("")).unwrap_err().kind(), Kind::Io);
    }

    #[test]
    fn what_is_restored_is_started_only_as_a_domain() {
        use crate::cli::{Cli, Command};
        use clap::Parser;
        let request = |args: &[&str]| {
            let line = [&["vmbackup", "restore", "web1@latest"], args].concat();
            let Command::Restore(args) = Cli::try_parse_from(line).unwrap().command else {
                panic!("another command");
            };
            restore(args).map(drop).map_err(|error| error.kind())
        };
        assert_eq!(request(&["--to", "d", "--start"]), Err(Kind::Usage));
        assert_eq!(request(&["--to", "d", "--define", "--start"]), Ok(()));
        assert_eq!(request(&["--to", "d", "--as", "web2", "--start"]), Ok(()));
        assert_eq!(request(&["--to", "d", "--as", "a\nb"]), Err(Kind::Usage));
        assert!(Cli::try_parse_from(["vmbackup", "restore", "web1@latest"]).is_err());
    }

    #[test]
    fn times_have_units() {
        for (text, ms) in [("10", 10_000), ("10s", 10_000), ("500ms", 500), ("2m", 120_000)] {
            assert_eq!(duration("-", text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "s", "1.5s", "-1s", "1d", "99999999999999999999"] {
            assert!(duration("-", text).is_err(), "{text}");
        }
    }
}
