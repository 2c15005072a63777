//! `vmbackup serve POINT|FILE…`: disks for any NBD client.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::cli::activation;
use crate::cli::args::RepositoryArgs;
use crate::cli::context::Context;
use crate::cli::settings;
use crate::cli::tls_settings::TlsArgs;
use crate::error::{Error, Result};
use crate::job::serve::{self, Access, Endpoint, Limits, PlainText, Report, Request, Served};
use crate::units::ByteSize;

/// Serve the disks of points, straight from the repository, or images, to any NBD client
///
/// Prints a URI for each disk and serves until it is stopped (Ctrl-C, SIGTERM). A point is never
/// changed, and stays readable while it is served, also when it is forgotten.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Points (digits of an id, VM@latest, VM@TIME), images (a format is never guessed; raw ones are as
    /// long as the file, to the byte), NBD URIs
    #[arg(value_name = "POINT|FILE[,format=F]|NBD-URI", required = true)]
    what: Vec<String>,
    /// Only this disk of a point (vda); may be given more than once
    #[arg(long, value_name = "DISK")]
    disk: Vec<String>,
    /// Let clients write: to an overlay that is thrown away for a point; to a raw image itself, in
    /// place and for good. Its lock keeps QEMU and vmbackup off the file, but not a device or
    /// server that shows the same bytes under another name, and an overlay of the file breaks when
    /// it changes: serve a point, or a copy of the image, where either may be in use
    #[arg(long)]
    writable: bool,
    /// Tell what changed since this point, as a dirty bitmap; may be given more than once
    #[arg(long, value_name = "POINT", conflicts_with = "writable")]
    changes_since: Vec<String>,
    /// Keep the overlay in this file, and go on with it if it is there
    #[arg(long, value_name = "FILE", requires = "writable")]
    overlay: Option<PathBuf>,
    /// Make the disk this large, with zeroes behind its end; an overlay that is kept stays so. If
    /// it is served already, that server is asked: clients that connect to it from then on see the
    /// new size
    #[arg(long, value_name = "SIZE", requires = "writable")]
    size: Option<ByteSize>,
    /// Where overlays that are thrown away are made [default: below the cache directory]
    #[arg(long, value_name = "DIR", requires = "writable", conflicts_with = "overlay")]
    scratch_dir: Option<PathBuf>,
    /// Listen on this unix socket, for this user only [default: one below the runtime directory]
    #[arg(long, value_name = "PATH", group = "endpoint")]
    socket: Option<PathBuf>,
    /// Listen on this TCP address, or this vsock port for guests; port 0 lets the system choose
    #[arg(long, value_name = "ADDR:PORT|vsock:PORT", group = "endpoint")]
    listen: Option<ListenAt>,
    /// Serve one client on standard input and output
    #[arg(long, group = "endpoint")]
    stdio: bool,
    /// Let other hosts, or guests over vsock, connect without TLS: anybody there can read the disks
    #[arg(long)]
    insecure_tcp: bool,
    /// Memory for chunks of the repository
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    cache: ByteSize,
    /// Memory for requests in progress, of all clients together; at least 64M, and more where there
    /// may be more than 512 clients
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    client_memory: ByteSize,
    /// Most clients at once; one more is refused. A client that only connects, or never makes a
    /// request, makes room for others; one that is idle stays
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    max_connections: u16,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    repository: RepositoryArgs,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<()> {
    let what = args.what.iter().map(|text| settings::served(text)).collect::<Result<Vec<_>>>()?;
    let endpoints = endpoints(&args, context)?;
    let single = args.stdio.then(activation::standard_streams).transpose()?;
    let from_repository = what.iter().any(|served| matches!(served, Served::Point(_)));
    let repository =
        if from_repository { Some(context.open(&args.repository).await?) } else { None };
    let scratch = args.scratch_dir.unwrap_or_else(|| context.paths.cache.join("overlays"));
    let request = Request {
        what,
        disks: args.disk,
        access: if args.writable {
            let size_bytes = args.size.map(|size| size.0);
            Access::Writable { overlay: args.overlay, scratch, size_bytes }
        } else {
            Access::ReadOnly
        },
        changes_since: args.changes_since,
        cache_bytes: args.cache.0,
        limits: limits(args.max_connections, args.client_memory)?,
        tls: args.tls.options()?,
        plain_text: if args.insecure_tcp { PlainText::Anywhere } else { PlainText::ThisHost },
    };
    let serving =
        Box::pin(serve::open(repository.as_ref(), request, endpoints, &context.env)).await?;
    if let Some(client) = single {
        // Standard output is the client's.
        return serving.run_single(client, &context.control).await;
    }
    context.output.document("serve", serving.report(), describe)?;
    serving.run(&context.control).await
}

fn limits(connections: u16, memory: ByteSize) -> Result<Limits> {
    let connections = usize::from(connections);
    let total_bytes = usize::try_from(memory.0).unwrap_or(usize::MAX);
    let limits = Limits { connections, total_bytes, ..Limits::default() };
    limits.check().map_err(|error| {
        let least = Limits::total_bytes_min(connections) >> 20;
        error.hint(format!("give --client-memory {least}M, or a smaller --max-connections"))
    })?;
    Ok(limits)
}

/// A port to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListenAt {
    Tcp(SocketAddr),
    Vsock(u32),
}

impl FromStr for ListenAt {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(port) = text.strip_prefix("vsock:") {
            // Ports beyond 31 bits are none for libnbd.
            let port = port.parse().ok().filter(|port: &u32| i32::try_from(*port).is_ok());
            return port.map(Self::Vsock).ok_or_else(|| "not a vsock port".to_owned());
        }
        text.parse().map(Self::Tcp).map_err(|_| "neither ADDR:PORT nor vsock:PORT".to_owned())
    }
}

/// Where clients come from: as told, else the sockets this process was started with, else a new
/// one.
fn endpoints(args: &Args, context: &Context) -> Result<Vec<Endpoint>> {
    if args.stdio {
        return Ok(Vec::new());
    }
    if let Some(path) = &args.socket {
        return Ok(vec![Endpoint::Unix(path.clone())]);
    }
    match args.listen {
        Some(ListenAt::Tcp(address)) => return Ok(vec![Endpoint::Tcp(address)]),
        Some(ListenAt::Vsock(port)) => return Ok(vec![Endpoint::Vsock(port)]),
        None => {}
    }
    let inherited = activation::sockets()?;
    if !inherited.is_empty() {
        return Ok(inherited.into_iter().map(Endpoint::Inherited).collect());
    }
    let directory = &context.paths.runtime;
    std::fs::create_dir_all(directory)
        .map_err(|e| Error::io(format!("cannot make {}", directory.display()), e))?;
    Ok(vec![Endpoint::Unix(directory.join(format!("serve-{}.sock", std::process::id())))])
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    for export in &report.exports {
        match &export.uri {
            Some(uri) => drop(writeln!(out, "{uri}")),
            None => drop(writeln!(out, "{}", export.name)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_of_tcp_or_of_vsock() {
        let parse = |text: &str| text.parse::<ListenAt>();
        assert_eq!(parse("vsock:10809"), Ok(ListenAt::Vsock(10809)));
        assert_eq!(parse("[::1]:7"), Ok(ListenAt::Tcp("[::1]:7".parse().unwrap())));
        for wrong in ["vsock:", "vsock:x", "vsock:2147483648", "vsock", "10809", "host:1", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
