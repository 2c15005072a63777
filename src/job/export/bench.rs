//! How fast an export answers: throughput and latency of requests of one size.
//!
//! So many requests are in flight all the time, each sent as soon as another is answered. The first
//! error ends it: a server that fails requests is not slow but broken. Latencies are counted in
//! buckets that are 6 % wide, so memory does not grow with the time it takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::block::{BlockSink, BlockSource, Buffer};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::nbd::{Access, Client, ClientOptions, InitialContent, NbdUri};

/// How to load the export.
#[derive(Clone, Debug)]
pub struct Request {
    /// The export.
    pub uri: NbdUri,
    /// What is asked.
    pub direction: Direction,
    /// Where.
    pub order: Order,
    /// Bytes of a request.
    pub request_bytes: u64,
    /// Requests in flight on each connection.
    pub requests: u16,
    /// Connections; one where the server does not allow more.
    pub connections: usize,
    /// For how long.
    pub duration: Duration,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes, and a flush at the end, which counts: what the export held is lost.
    Overwrite,
    /// Both, mixed: so many requests of a hundred are reads.
    Mixed {
        /// At most 100.
        reads_percent: u8,
    },
}

impl Direction {
    /// What the request of this number does.
    fn of(self, number: u64) -> Self {
        match self {
            // Scattered, so that neighbours differ whatever the share.
            Self::Mixed { reads_percent } => {
                let reads = scattered(!number) % 100 < u64::from(reads_percent);
                if reads { Self::Read } else { Self::Overwrite }
            }
            one => one,
        }
    }
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, from the start again at the end.
    Sequential,
    /// Anywhere, the same places each time.
    Random,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The export.
    pub uri: String,
    /// Connections that were used.
    pub connections: usize,
    /// Requests in flight, on all of them.
    pub in_flight: usize,
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes they carried.
    pub bytes: u64,
    /// Time it took.
    pub elapsed_ms: u64,
    /// Requests a second.
    pub requests_per_second: u64,
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// Requests that were reads.
    pub reads: u64,
    /// Requests that were writes.
    pub writes: u64,
    /// Time from a request to its answer.
    pub latency_us: Latency,
    /// The same of the reads; `None` where there were none.
    pub read_latency_us: Option<Latency>,
    /// The same of the writes.
    pub write_latency_us: Option<Latency>,
}

/// Times in microseconds, exact to 6 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Of the fastest.
    pub min: u64,
    /// On average.
    pub mean: u64,
    /// Half of all are faster.
    pub p50: u64,
    /// 9 in 10 are faster.
    pub p90: u64,
    /// 99 in 100.
    pub p99: u64,
    /// 999 in 1000.
    pub p999: u64,
    /// Of the slowest.
    pub max: u64,
}

/// Loads the export until the time is over.
pub async fn run(request: &Request, control: &Control) -> Result<Report> {
    control.set_phase("measuring");
    control.run(measure(request)).await
}

async fn measure(request: &Request) -> Result<Report> {
    let access = match request.direction {
        Direction::Read => Access::Read,
        Direction::Overwrite | Direction::Mixed { .. } => Access::Write(InitialContent::Unknown),
    };
    let (connections, in_flight) = (request.connections.max(1), request.requests.max(1));
    let options = ClientOptions { access, connections, in_flight, ..ClientOptions::default() };
    let client = Arc::new(Box::pin(Client::open_uri(&request.uri, options)).await?);
    check(request, &client)?;
    let connections = client.connection_count();
    let in_flight = connections * usize::from(in_flight);
    let begun = Instant::now();
    let load = Arc::new(Load {
        places: BlockSource::geometry(&*client).size_bytes / request.request_bytes,
        client,
        direction: request.direction,
        order: request.order,
        request_bytes: request.request_bytes,
        until: begun + request.duration,
        next: AtomicU64::new(0),
    });
    let mut running: JoinSet<_> = (0..in_flight).map(|_| Arc::clone(&load).send()).collect();
    let mut seen = Seen::default();
    while let Some(ended) = running.join_next().await {
        let ended =
            ended.map_err(|e| Error::new(Kind::Internal, "a task of the benchmark died").source(e));
        let ended = ended??;
        seen.reads.add(&ended.reads);
        seen.writes.add(&ended.writes);
    }
    if request.direction != Direction::Read {
        load.client.flush().await?;
    }
    Ok(report(request, &seen, (connections, in_flight), begun.elapsed()))
}

fn report(
    request: &Request,
    seen: &Seen,
    (connections, in_flight): (usize, usize),
    elapsed: Duration,
) -> Report {
    let mut times = Times::default();
    times.add(&seen.reads);
    times.add(&seen.writes);
    let bytes = times.count * request.request_bytes;
    let only = |times: &Times| (times.count > 0).then(|| times.latency());
    let micros = elapsed.as_micros().max(1);
    let per_second = |n: u64| u64::try_from(u128::from(n) * 1_000_000 / micros).unwrap_or(u64::MAX);
    Report {
        uri: request.uri.to_string(),
        connections,
        in_flight,
        requests: times.count,
        bytes,
        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        requests_per_second: per_second(times.count),
        bytes_per_second: per_second(bytes),
        reads: seen.reads.count,
        writes: seen.writes.count,
        latency_us: times.latency(),
        read_latency_us: only(&seen.reads),
        write_latency_us: only(&seen.writes),
    }
}

fn check(request: &Request, client: &Client) -> Result<()> {
    let geometry = BlockSource::geometry(client);
    let bytes = request.request_bytes;
    let refuse = |why: String| {
        let message = format!("requests of {bytes} bytes do not fit {}: {why}", request.uri);
        Err(Error::new(Kind::Usage, message).hint("choose another --request-size"))
    };
    if bytes == 0 || !bytes.is_multiple_of(geometry.align_bytes) {
        return refuse(format!("its blocks have {}", geometry.align_bytes));
    }
    if bytes > geometry.request_bytes_max {
        return refuse(format!("it takes {} at most", geometry.request_bytes_max));
    }
    if bytes > geometry.size_bytes {
        return refuse(format!("it has {}", geometry.size_bytes));
    }
    Ok(())
}

/// What the tasks share.
struct Load {
    client: Arc<Client>,
    direction: Direction,
    order: Order,
    request_bytes: u64,
    /// Places for a request on the disk.
    places: u64,
    until: Instant,
    next: AtomicU64,
}

impl Load {
    /// One request after the other, until the time is over.
    async fn send(self: Arc<Self>) -> Result<Seen> {
        let mut seen = Seen::default();
        let len = usize::try_from(self.request_bytes).expect("at most 32 MiB");
        // No zeroes: servers make holes of them.
        let content: Vec<u8> = (0..=250).cycle().map(|n: u8| n + 1).take(len).collect();
        let mut spare = content.clone();
        while Instant::now() < self.until {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let offset = self.place(number) * self.request_bytes;
            let write = self.direction.of(number) != Direction::Read;
            if write {
                spare.clone_from(&content);
            } else {
                // A write took it along.
                spare.resize(len, 0);
            }
            let buffer = Buffer::unbudgeted(std::mem::take(&mut spare));
            let begun = Instant::now();
            if write {
                self.client.write(offset, buffer).await?;
                seen.writes.count(begun.elapsed());
            } else {
                let read = self.client.read(offset, buffer).await?;
                seen.reads.count(begun.elapsed());
                spare = read.to_vec();
            }
        }
        Ok(seen)
    }

    fn place(&self, number: u64) -> u64 {
        match self.order {
            Order::Sequential => number % self.places,
            Order::Random => scattered(number) % self.places,
        }
    }
}

/// The finalizer of SplitMix64: numbers that follow each other, far apart.
fn scattered(n: u64) -> u64 {
    let mut x = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Buckets of a power of two: 6 % each.
const STEPS: usize = 16;

/// What was measured.
#[derive(Default)]
struct Seen {
    reads: Times,
    writes: Times,
}

/// How often which time was seen, in microseconds.
struct Times {
    buckets: Vec<u64>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

impl Default for Times {
    fn default() -> Self {
        Self { buckets: vec![0; STEPS * 61], count: 0, sum: 0, min: u64::MAX, max: 0 }
    }
}

impl Times {
    fn count(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)] += 1;
        self.count += 1;
        self.sum += u128::from(micros);
        (self.min, self.max) = (self.min.min(micros), self.max.max(micros));
    }

    fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(sum, n)| *sum += n);
        self.count += other.count;
        self.sum += other.sum;
        (self.min, self.max) = (self.min.min(other.min), self.max.max(other.max));
    }

    fn latency(&self) -> Latency {
        if self.count == 0 {
            return Latency::default();
        }
        let at = |per_mille: u64| {
            let rank = (u128::from(self.count) * u128::from(per_mille)).div_ceil(1000);
            let mut seen = 0;
            let found = self.buckets.iter().position(|n| {
                seen += u128::from(*n);
                seen >= rank
            });
            lowest(found.expect("all are counted")).clamp(self.min, self.max)
        };
        Latency {
            min: self.min,
            mean: u64::try_from(self.sum / u128::from(self.count)).unwrap_or(u64::MAX),
            p50: at(500),
            p90: at(900),
            p99: at(990),
            p999: at(999),
            max: self.max,
        }
    }
}

/// Values below 16 have buckets of their own; above, the highest bit and the four after it choose.
fn bucket(value: u64) -> usize {
    let steps = STEPS as u64;
    if value < steps {
        return usize::try_from(value).expect("below 16");
    }
    let shift = value.ilog2() - steps.ilog2();
    let step = usize::try_from((value >> shift) - steps).expect("below 16");
    STEPS * (usize::try_from(shift).expect("below 60") + 1) + step
}

/// The smallest value of a bucket.
fn lowest(bucket: usize) -> u64 {
    let step = (bucket % STEPS) as u64;
    match bucket / STEPS {
        0 => step,
        row => (STEPS as u64 + step) << (row - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_has_the_share_of_reads_it_is_told() {
        for reads_percent in [0, 30, 100] {
            let mix = Direction::Mixed { reads_percent };
            let reads = (0..10_000).filter(|n| mix.of(*n) == Direction::Read).count();
            let wanted = usize::from(reads_percent) * 100;
            assert!(reads.abs_diff(wanted) < 200, "{reads_percent} %: {reads}");
        }
    }

    #[test]
    fn a_bucket_holds_values_within_6_percent() {
        for value in
            (0..1000).chain((0..64).flat_map(|bit| [1 << bit, (1 << bit) + (1 << bit) / 3]))
        {
            let from = lowest(bucket(value));
            assert!(from <= value && value - from <= value / STEPS as u64, "{value}: {from}");
        }
        assert_eq!(bucket(u64::MAX), STEPS * 61 - 1);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_times() {
        let mut times = Times::default();
        (1..=10).for_each(|n| times.count(Duration::from_micros(n)));
        let mut more = Times::default();
        more.count(Duration::from_millis(10));
        times.add(&more);
        let found = times.latency();
        assert_eq!((found.min, found.p50, found.p90, found.max), (1, 6, 10, 10_000));
        assert!((9_400..=10_000).contains(&found.p99), "{found:?}");
        assert_eq!(found.mean, 10_055 / 11);
        assert_eq!(Times::default().latency(), Latency::default());
    }
}
