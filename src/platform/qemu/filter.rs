//! Copy-before-write filters between the guest's devices and their nodes: the guest comes first.
//!
//! ```text
//!  device ──► filter ──► disk node [bitmaps]          (drive=filter, set while the guest runs)
//!                └─────► scratch node: old content, before it is overwritten
//! ```
//!
//! Where a job's filter fails the guest's write when scratch is full or hangs, this one lets the
//! write pass and gives the instant up (`on-cbw-error=break-snapshot`, `cbw-timeout`; QEMU 7.1):
//! every read of the instant fails from then on, for good.
//!
//! What a transaction cannot do has to be right by order: the new bitmap is there before the device
//! is moved onto the filter, and the base's is merged after it, so that each disk's bitmap holds at
//! least what it should whatever the guest writes in between. One instant for several disks needs
//! a pause (`pause`).
//!
//! A device is moved back only from our filter, and only while nobody else has a block job: such a
//! job puts a node of its own below the device, which would be cut off.

use qmp::Monitor;
use qmp::block::Device;
use serde_json::json;

use super::error::failed;
use super::graph::Graph;
use super::names::Temp;
use super::teardown::del_node;
use super::{Qemu, Survey};
use crate::error::{Error, Kind, Result};

/// Seconds a write of the guest waits for scratch, then the instant breaks. More than a busy disk
/// takes, less than a guest's own limit (30 s for SCSI in Linux), and no more than older QEMUs can
/// count: they hold nanoseconds in 32 bits (4.29 s; "block/copy-before-write: use uint64_t for
/// timeout in nanoseconds", after 9.0).
const WAIT_SECS: u32 = 4;
/// Separates the parts of a filter in the journal.
const SEPARATOR: char = '\t';

/// A filter and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Its node.
    pub(super) name: String,
    /// The node the device had before it; not known where the journal is lost.
    pub(super) node: Option<String>,
    /// QOM path of the device.
    pub(super) device: String,
}

impl Filter {
    /// Puts the filter above the node. The guest's device is not touched.
    pub(super) async fn add(&self, monitor: &Monitor, scratch: &str) -> Result<()> {
        let options = json!({
            "driver": "copy-before-write", "node-name": self.name, "file": self.node,
            "target": scratch, "on-cbw-error": "break-snapshot", "cbw-timeout": WAIT_SECS,
        });
        let what = format!("cannot filter the writes of {}", self.device);
        monitor.blockdev_add(options).await.map_err(failed(what))
    }

    /// Fails unless the device is where it was found, and alone there: a job of somebody else has
    /// put a node of its own between the two, or soon will, and would miss every write from now on.
    pub(super) async fn check(filters: &[Self], monitor: &Monitor) -> Result<()> {
        // Before the nodes: one that a job put in is the job's.
        if let Some(job) = foreign_job(monitor).await? {
            return Err(Error::new(Kind::Busy, format!("the block job '{job}' has begun")));
        }
        let devices = monitor.query_block().await.map_err(failed("cannot ask for the disks"))?;
        for Self { node, device, .. } in filters {
            let is_it = |found: &&Device| {
                found.qdev.as_deref().is_some_and(|qdev| qom_path(qdev) == *device)
            };
            let found = devices.iter().find(is_it).and_then(|found| found.inserted.as_ref());
            if found.map(qmp::block::Node::name) != node.as_deref() {
                let what = format!("{device} has another image than a moment ago");
                return Err(Error::new(Kind::SnapshotLost, what).hint("run it again"));
            }
        }
        Ok(())
    }

    /// Moves the device onto the filter: its instant.
    pub(super) async fn attach(&self, monitor: &Monitor) -> Result<()> {
        let what = format!("cannot move {} onto a filter", self.device);
        let moved = monitor.qom_set(&self.device, "drive", json!(self.name)).await;
        moved.map_err(failed(what))
    }

    /// Moves the device back and removes the filter, as far as they are there.
    pub(super) async fn remove(&self, monitor: &Monitor) -> Result<()> {
        self.detach(monitor).await?;
        del_node(monitor, &self.name).await
    }

    /// Moves the device back, if it is on the filter: a read of the instant is one of the live disk
    /// from then on, so that nobody may be able to read it any more.
    pub(super) async fn detach(&self, monitor: &Monitor) -> Result<()> {
        let devices = monitor.query_block().await.map_err(failed("cannot ask for the disks"))?;
        if !self.is_attached(&devices) {
            return Ok(());
        }
        let (device, filter) = (&self.device, &self.name);
        // Somebody may have put an overlay between the two: the device's writes go there. Where QEMU
        // does not tell, the filter is taken to be above the node it was put on.
        let graph = Graph::ask(monitor).await?;
        let below = graph.as_ref().and_then(|graph| graph.below(filter));
        let Some(node) = below.or(self.node.as_deref()) else {
            let what = format!("nothing tells which node {device} had before {filter}");
            return Err(Error::new(Kind::NotFound, what).hint(format!(
                "set it by hand: the monitor command qom-set with path {device}, property drive \
                 and the node's name, then blockdev-del {filter}"
            )));
        };
        if let Some(job) = foreign_job(monitor).await? {
            let what = format!("{filter} stays below {device} as long as the job '{job}' runs");
            return Err(Error::new(Kind::Busy, what)
                .hint("when that job has ended, run 'vmbackup recover' or the next backup"));
        }
        let what = format!("cannot move {device} back from its filter");
        monitor.qom_set(device, "drive", json!(node)).await.map_err(failed(what))
    }

    /// Whether the device writes through the filter.
    pub(super) fn is_attached(&self, devices: &[Device]) -> bool {
        devices.iter().any(|device| is_on(device, &self.name))
    }

    /// As the journal has it.
    pub(super) fn to_entry(&self) -> String {
        let node = self.node.as_deref().unwrap_or_default();
        format!("{}{SEPARATOR}{node}{SEPARATOR}{}", self.name, self.device)
    }

    /// The filter called `name`, which is in QEMU, with what entries of journals tell of it.
    pub(super) fn found<'a>(
        name: &str,
        devices: &[Device],
        mut entries: impl Iterator<Item = &'a str>,
    ) -> Self {
        let entry = entries.find_map(|entry| {
            let rest = entry.strip_prefix(name)?.strip_prefix(SEPARATOR)?;
            rest.split_once(SEPARATOR)
        });
        let on = devices.iter().find(|device| is_on(device, name));
        let there = on.and_then(|device| device.qdev.as_deref()).map(qom_path);
        let noted = entry.map(|(_, device)| device.to_owned());
        Self {
            name: name.to_owned(),
            node: entry.map(|(node, _)| node.to_owned()),
            device: there.or(noted).unwrap_or_default(),
        }
    }
}

fn is_on(device: &Device, filter: &str) -> bool {
    device.inserted.as_ref().is_some_and(|node| node.name() == filter)
}

/// Older QEMUs give the id alone.
fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// The filters of a run; refuses where the guest cannot come first.
pub(super) async fn plan(
    qemu: &Qemu,
    survey: &Survey,
    name: impl Fn(usize) -> String,
) -> Result<Vec<Filter>> {
    let features = &qemu.features;
    if !(features.copy_before_write && features.cbw_on_error && features.cbw_timeout) {
        return Err(Error::new(
            Kind::Unsupported,
            "this QEMU cannot let a backup break instead of the guest's write (--guest-first)",
        )
        .hint("QEMU 7.2 or newer is needed; without --guest-first scratch is watched"));
    }
    if let Some(job) = foreign_job(&qemu.monitor).await? {
        let what = format!("a block job of somebody else runs: '{job}'");
        return Err(Error::new(Kind::Busy, what)
            .hint("wait for it, or leave out --guest-first if it is on another disk"));
    }
    let filter = |(index, disk): (usize, &super::disks::Disk)| {
        let Some(qdev) = &disk.qdev else {
            let what = format!("the device of disk {} has no place in QEMU's tree", disk.name);
            return Err(Error::new(Kind::Unsupported, what).hint(
                "start QEMU with '-device …,id=NAME' for it, leave the disk out (--exclude-disk), \
                 or back up without --guest-first",
            ));
        };
        let node = Some(disk.node.name().to_owned());
        Ok(Filter { name: name(index), node, device: qom_path(qdev) })
    };
    survey.disks.protected.iter().enumerate().map(filter).collect()
}

/// A job on a block device that is not ours.
async fn foreign_job(monitor: &Monitor) -> Result<Option<String>> {
    let jobs = monitor.query_block_jobs().await.map_err(failed("cannot ask for the jobs"))?;
    Ok(jobs.into_iter().map(|job| job.device).find(|id| !Temp::Job.is(id)))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::super::disks::tests::device;
    use super::*;

    /// A QEMU whose device is on the filter, and which does not say what is below it.
    async fn silent(listener: tokio::net::UnixListener, filter: String) -> Vec<String> {
        let (stream, _) = listener.accept().await.unwrap();
        let (reader, mut writer) = stream.into_split();
        let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 0 }, "package": "" });
        let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
        let mut lines = BufReader::new(reader).lines();
        writer.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
        let mut heard = Vec::new();
        while let Ok(Some(line)) = lines.next_line().await {
            let command: serde_json::Value = serde_json::from_str(&line).unwrap();
            let name = command["execute"].as_str().unwrap().to_owned();
            heard.push(name.clone());
            let found = match name.as_str() {
                "query-block" => json!([{ "device": "", "qdev": "a",
                    "removable": false, "inserted": { "node-name": filter, "drv": "copy-before-write",
                    "ro": false, "file": "a", "image": { "filename": "a", "format": "raw",
                    "virtual-size": 1 } } }]),
                "x-debug-query-block-graph" => continue,
                "query-block-jobs" => json!([]),
                _ => json!({}),
            };
            let answer = json!({ "return": found, "id": command["id"] });
            writer.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
        }
        heard
    }

    #[tokio::test]
    async fn a_device_stays_on_its_filter_where_qemu_does_not_answer_what_is_below() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("m.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let filter = Filter { name: "f".into(), node: Some("n".into()), device: "a".into() };
        let qemu = tokio::spawn(silent(listener, filter.name.clone()));
        let short = std::time::Duration::from_millis(200);
        let options = qmp::Options { command: short, ..qmp::Options::default() };
        let monitor = Monitor::connect(&qmp::Address::Unix(socket), options).await.unwrap();
        let error = filter.detach(&monitor).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
        drop(monitor);
        let heard = qemu.await.unwrap();
        assert!(heard.iter().any(|name| name == "x-debug-query-block-graph"), "{heard:?}");
        assert!(!heard.iter().any(|name| name == "qom-set"), "{heard:?}");
    }

    #[test]
    fn a_filter_is_found_again_with_what_the_journal_has() {
        let filter = Filter {
            name: "vmb-cbw-01010101-0".into(),
            node: Some("#block12".into()),
            device: "/machine/peripheral/a/virtio-backend".into(),
        };
        let entry = filter.to_entry();
        let other = entry.replace("-0\t", "-01\t");
        let entries = || [other.as_str(), entry.as_str()].into_iter();
        assert_eq!(Filter::found(&filter.name, &[], entries()), filter);
        // The device says itself where it is.
        let on = device("a", &filter.name, json!({}));
        let found = Filter::found(&filter.name, std::slice::from_ref(&on), entries());
        assert_eq!(found.device, "/machine/peripheral/a");
        assert!(found.is_attached(&[on]));
        assert_eq!(Filter::found(&filter.name, &[], [].into_iter()).node, None);
    }
}
