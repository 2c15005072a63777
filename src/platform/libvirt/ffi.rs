//! Safe wrappers over the C calls of libvirt that the `virt` crate lacks.
//!
//! The only file of the crate that calls C: backup jobs, checkpoints, freeze and thaw, job
//! statistics, domain events, and the event loop they need. Everything here *blocks*; only
//! [`super::connection`] calls it, from threads made for blocking.
//!
//! Rules kept here:
//! - Text goes in through [`text`], which refuses NUL bytes; text that comes out is copied and the
//!   C memory freed with the allocator that made it.
//! - Errors are read on the thread of the failed call, before any other call: libvirt keeps the
//!   last error per thread.
//! - A libvirt object is freed exactly once, by the guard that owns it; freeing never panics.
#![allow(unsafe_code)] // Calls into libvirt.so; each block says why it is sound.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::raw::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::ptr;
use std::sync::OnceLock;

use tokio::sync::mpsc;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::enumutil::Enum;
use virt::error::{Error as VirtError, ErrorNumber};
use virt::sys;

use crate::freeze::FileSystem;

/// Most file systems of a guest looked at.
const FILE_SYSTEMS_MAX: usize = 1024;

/// Most disk errors asked for: the daemon refuses more (`REMOTE_DOMAIN_DISK_ERRORS_MAX`).
const DISK_ERRORS_MAX: usize = 256;

/// Result of a libvirt call.
pub(super) type VirtResult<T> = Result<T, VirtError>;

/// Events kept for a listener that does not come round to them; further ones are dropped. A backup
/// sees a handful, and `still_valid` asks the job itself as well.
const EVENTS_MAX: usize = 64;

/// Most parameters read from one job: libvirt 11 has fewer than 60.
const PARAMETERS_MAX: usize = 512;

/// Most parameters read of the block statistics of a domain: libvirt has some 15 for each layer, and
/// 200 layers of 16 disks are more than anybody has.
const BLOCK_PARAMETERS_MAX: usize = 50_000;

/// Makes libvirt quiet and its events delivered: installs a silent error handler (the default one
/// prints every error to stderr) and starts the event loop on a thread of its own.
///
/// libvirt wants the event implementation registered before the first connection is opened; every
/// way to a connection comes through here.
pub(super) fn initialise() -> VirtResult<()> {
    static DONE: OnceLock<VirtResult<()>> = OnceLock::new();
    DONE.get_or_init(|| {
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl()?;
        let loop_thread = std::thread::Builder::new().name("libvirt-events".into()).spawn(|| {
            loop {
                // An error here is that of one callback's poll; the loop goes on for the others.
                if let Err(error) = virt::event::event_run_default_impl() {
                    tracing::warn!(%error, "libvirt event loop");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        });
        loop_thread.map(drop).map_err(|error| {
            tracing::error!(%error, "cannot start the libvirt event thread");
            VirtError::last_error()
        })
    })
    .clone()
}

/// Text for C; a NUL inside is libvirt's "invalid argument", not a panic.
fn text(value: &str) -> VirtResult<CString> {
    CString::new(value).map_err(VirtError::from)
}

/// Takes over a malloc'ed string of libvirt; NULL is the last error.
fn take_string(raw: *mut c_char) -> VirtResult<String> {
    if raw.is_null() {
        return Err(VirtError::last_error());
    }
    // SAFETY: libvirt returned a NUL-terminated string that the caller frees with free().
    unsafe {
        let value = CStr::from_ptr(raw).to_string_lossy().into_owned();
        libc_free(raw.cast());
        Ok(value)
    }
}

unsafe extern "C" {
    /// The C library's `free`: libvirt documents that its strings and lists are freed with it.
    #[link_name = "free"]
    fn libc_free(pointer: *mut c_void);
}

/// -1 is the last error.
fn check(result: c_int) -> VirtResult<c_int> {
    if result < 0 { Err(VirtError::last_error()) } else { Ok(result) }
}

/// Starts a backup job, with the checkpoint created in the same transaction.
pub(super) fn backup_begin(
    domain: &Domain,
    backup_xml: &str,
    checkpoint_xml: Option<&str>,
) -> VirtResult<()> {
    let backup = text(backup_xml)?;
    let checkpoint = checkpoint_xml.map(text).transpose()?;
    let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |xml| xml.as_ptr());
    // SAFETY: the domain lives through the call, the strings are NUL-terminated and outlive it.
    check(unsafe { sys::virDomainBackupBegin(domain.as_ptr(), backup.as_ptr(), checkpoint, 0) })?;
    Ok(())
}

/// The running backup job; the error code is `NoDomainBackup` when there is none.
pub(super) fn backup_xml(domain: &Domain) -> VirtResult<String> {
    // SAFETY: the domain lives through the call.
    take_string(unsafe { sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0) })
}

/// Ends the domain's job. For a pull-mode backup this is the normal end.
pub(super) fn abort_job(domain: &Domain) -> VirtResult<()> {
    // SAFETY: the domain lives through the call.
    check(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })?;
    Ok(())
}

/// Freezes all guest file systems; how many.
pub(super) fn freeze(domain: &Domain) -> VirtResult<u32> {
    // SAFETY: no mount points given (NULL, 0) means all; the domain lives through the call.
    let count = check(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), ptr::null_mut(), 0, 0) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// Thaws all guest file systems; how many.
pub(super) fn thaw(domain: &Domain) -> VirtResult<u32> {
    // SAFETY: as in `freeze`.
    let count = check(unsafe { sys::virDomainFSThaw(domain.as_ptr(), ptr::null_mut(), 0, 0) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// The file systems mounted in the guest, as its agent tells.
pub(super) fn file_systems(domain: &Domain) -> VirtResult<Vec<FileSystem>> {
    let mut list: *mut sys::virDomainFSInfoPtr = ptr::null_mut();
    // SAFETY: on success libvirt stores a malloc'ed array of owned entries.
    let count = check(unsafe { sys::virDomainGetFSInfo(domain.as_ptr(), &raw mut list, 0) })?;
    let mut systems = Vec::new();
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the array has `count` entries, whose strings are NUL-terminated or NULL and are
        // copied before the entry is freed, once.
        unsafe {
            let entry = *list.add(index);
            let text = |raw: *mut c_char| {
                if raw.is_null() {
                    return String::new();
                }
                CStr::from_ptr(raw).to_string_lossy().into_owned()
            };
            if systems.len() < FILE_SYSTEMS_MAX {
                systems.push(FileSystem {
                    device: text((*entry).name),
                    mount_point: text((*entry).mountpoint),
                    kind: text((*entry).fstype),
                });
            }
            sys::virDomainFSInfoFree(entry);
        }
    }
    // SAFETY: the array itself is the caller's to free.
    unsafe { libc_free(list.cast()) };
    Ok(systems)
}

/// Paths of the images that the disks of a running domain have open, by the numbers its XML gives
/// the layers; of those that are files or devices of the host.
pub(super) fn layer_paths(domain: &Domain) -> VirtResult<Vec<(u32, String)>> {
    // SAFETY: borrowed from the domain, which lives through this function.
    let mut domains = [unsafe { domain.as_ptr() }, ptr::null_mut()];
    let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: the list of domains ends with NULL and outlives the call, which stores a list of
    // `count` owned records on success.
    let count = check(unsafe {
        sys::virDomainListGetStats(
            domains.as_mut_ptr(),
            sys::VIR_DOMAIN_STATS_BLOCK,
            &raw mut records,
            sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING,
        )
    })?;
    let (mut indices, mut paths) = (BTreeMap::new(), BTreeMap::new());
    for record in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` records, each with `nparams` valid parameters that live until
        // the list is freed; the union member read is the one `type_` names, and text is copied.
        unsafe {
            let record = *records.add(record);
            let count = usize::try_from((*record).nparams).unwrap_or(0);
            for at in 0..count.min(BLOCK_PARAMETERS_MAX) {
                let parameter = &*(*record).params.add(at);
                let name = CStr::from_ptr(parameter.field.as_ptr()).to_string_lossy();
                let kind = c_uint::try_from(parameter.type_).unwrap_or(0);
                if let Some(block) = name.strip_suffix(".backingIndex")
                    && kind == sys::VIR_TYPED_PARAM_UINT
                {
                    indices.insert(block.to_owned(), parameter.value.ui);
                } else if let Some(block) = name.strip_suffix(".path")
                    && kind == sys::VIR_TYPED_PARAM_STRING
                    && !parameter.value.s.is_null()
                {
                    let path = CStr::from_ptr(parameter.value.s).to_string_lossy().into_owned();
                    paths.insert(block.to_owned(), path);
                }
            }
        }
    }
    // SAFETY: frees the list and its records, once.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    let index = |(block, path)| Some((*indices.get(&block)?, path));
    Ok(paths.into_iter().filter_map(index).collect())
}

/// What a domain's job is doing or did.
#[derive(Clone, Debug, Default)]
pub(super) struct JobStatus {
    /// A job is active now.
    pub(super) active: bool,
    /// `VIR_DOMAIN_JOB_OPERATION_*`, if told.
    pub(super) operation: Option<u32>,
    /// Why it failed.
    pub(super) error: Option<String>,
    /// Bytes all disks of a pull-mode backup may need as scratch: those of the disks whose jobs
    /// libvirt has not begun to end, and of those whose end it has taken note of.
    pub(super) scratch_bytes_max: Option<u64>,
}

impl JobStatus {
    /// Whether the domain is migrated to here.
    pub(super) fn is_arriving(&self) -> bool {
        self.active && self.operation == Some(sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN)
    }

    /// The job in a word.
    pub(super) fn describe(&self) -> &'static str {
        match self.operation {
            Some(sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN) => "an incoming migration",
            Some(sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT) => "a migration",
            Some(sys::VIR_DOMAIN_JOB_OPERATION_SAVE) => "a save",
            Some(sys::VIR_DOMAIN_JOB_OPERATION_RESTORE) => "a restore",
            Some(sys::VIR_DOMAIN_JOB_OPERATION_DUMP) => "a memory dump",
            Some(sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT) => "a snapshot",
            Some(sys::VIR_DOMAIN_JOB_OPERATION_BACKUP) => "a backup",
            _ => "another job",
        }
    }
}

/// Statistics of the running job. Of an incoming migration libvirt tells nothing but that there is one: it is
/// the only job for which it says that they are not supported here (`qemuDomainGetJobStatsInternal`).
pub(super) fn job_status(domain: &Domain) -> VirtResult<JobStatus> {
    let arriving = Enum::Known(ErrorNumber::OperationUnsupported);
    match job_statistics(domain) {
        Err(error) if error.code() == arriving => {
            let operation = Some(sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN);
            Ok(JobStatus { active: true, operation, ..JobStatus::default() })
        }
        told => told,
    }
}

fn job_statistics(domain: &Domain) -> VirtResult<JobStatus> {
    let mut kind: c_int = 0;
    let mut parameters: sys::virTypedParameterPtr = ptr::null_mut();
    let mut count: c_int = 0;
    // SAFETY: libvirt fills the three out-parameters on success and leaves them alone otherwise.
    check(unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut parameters,
            &raw mut count,
            0,
        )
    })?;
    // SAFETY: `count` parameters lie at `parameters`, both as libvirt returned them.
    let mut status = unsafe { job_parameters(parameters, count) };
    // SAFETY: frees what the call above allocated, once; NULL is accepted.
    unsafe { sys::virTypedParamsFree(parameters, count) };
    status.active = kind == c_int::try_from(sys::VIR_DOMAIN_JOB_BOUNDED).unwrap_or(1)
        || kind == c_int::try_from(sys::VIR_DOMAIN_JOB_UNBOUNDED).unwrap_or(2);
    Ok(status)
}

/// Bytes that QEMU's block job (a backup's, among others) on a disk has to do in all; `None` when
/// libvirt has no job there. QEMU lists a job that has ended until libvirt has taken note of it.
pub(super) fn block_job_bytes(domain: &Domain, disk: &str) -> VirtResult<Option<u64>> {
    let disk = text(disk)?;
    // SAFETY: the struct is plain numbers, for which zeroes are a value.
    let mut info: sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
    // SAFETY: the domain and the string outlive the call, which fills `info` when it returns 1.
    let found =
        unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) };
    Ok((check(found)? == 1).then_some(info.end))
}

/// Whether a disk of the domain has seen "no space left" since its guest last ran on.
pub(super) fn has_disk_without_space(domain: &Domain) -> VirtResult<bool> {
    // SAFETY: the struct is a pointer and a number, for which zeroes are values.
    let mut errors: [sys::virDomainDiskError; DISK_ERRORS_MAX] = unsafe { std::mem::zeroed() };
    let room = c_uint::try_from(DISK_ERRORS_MAX).expect("a small number");
    // SAFETY: there is room for as many errors as the call is told.
    let count =
        unsafe { sys::virDomainGetDiskErrors(domain.as_ptr(), errors.as_mut_ptr(), room, 0) };
    let count = usize::try_from(check(count)?).unwrap_or(0);
    let mut found = false;
    for error in errors.iter().take(count) {
        found |= c_uint::try_from(error.error) == Ok(sys::VIR_DOMAIN_DISK_ERROR_NO_SPACE);
        // SAFETY: the caller owns the names the call gave.
        unsafe { libc_free(error.disk.cast()) };
    }
    Ok(found)
}

/// Reads the parameters we know from a list libvirt made.
///
/// # Safety
/// `parameters` is NULL or points at `count` valid parameters.
unsafe fn job_parameters(parameters: sys::virTypedParameterPtr, count: c_int) -> JobStatus {
    let mut status = JobStatus::default();
    let count = usize::try_from(count).unwrap_or(0).min(PARAMETERS_MAX);
    if parameters.is_null() || count == 0 {
        return status;
    }
    // SAFETY: by this function's contract; the slice does not outlive the list.
    let list = unsafe { std::slice::from_raw_parts(parameters, count) };
    for parameter in list {
        // SAFETY: `field` is a NUL-terminated array; the union member read is the one `type_` names.
        unsafe {
            let name = CStr::from_ptr(parameter.field.as_ptr());
            let kind = c_uint::try_from(parameter.type_).unwrap_or(0);
            if name == sys::VIR_DOMAIN_JOB_OPERATION && kind == sys::VIR_TYPED_PARAM_INT {
                status.operation = u32::try_from(parameter.value.i).ok();
            } else if name == sys::VIR_DOMAIN_JOB_ERRMSG
                && kind == sys::VIR_TYPED_PARAM_STRING
                && !parameter.value.s.is_null()
            {
                let message = CStr::from_ptr(parameter.value.s);
                status.error = Some(message.to_string_lossy().into_owned());
            } else if name == sys::VIR_DOMAIN_JOB_DISK_TEMP_TOTAL
                && kind == sys::VIR_TYPED_PARAM_ULLONG
            {
                status.scratch_bytes_max = Some(parameter.value.ul);
            }
        }
    }
    status
}

/// A checkpoint of a domain.
pub(super) struct Checkpoint {
    raw: sys::virDomainCheckpointPtr,
}

// SAFETY: libvirt objects are reference-counted atomically and usable from any thread.
unsafe impl Send for Checkpoint {}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        // SAFETY: `raw` is a reference this guard owns. A failure means it was no checkpoint,
        // which cannot be; there is nothing to do about it here.
        unsafe { sys::virDomainCheckpointFree(self.raw) };
    }
}

impl Checkpoint {
    fn own(raw: sys::virDomainCheckpointPtr) -> VirtResult<Self> {
        if raw.is_null() { Err(VirtError::last_error()) } else { Ok(Self { raw }) }
    }

    /// Creates or (by `flags`, `VIR_DOMAIN_CHECKPOINT_CREATE_*`) redefines a checkpoint.
    pub(super) fn create(domain: &Domain, xml: &str, flags: u32) -> VirtResult<Self> {
        let xml = text(xml)?;
        // SAFETY: the domain and the string outlive the call; the result is ours to free.
        Self::own(unsafe {
            sys::virDomainCheckpointCreateXML(domain.as_ptr(), xml.as_ptr(), flags)
        })
    }

    /// The checkpoint called `name`; the error code is `NoDomainCheckpoint` when there is none.
    pub(super) fn lookup(domain: &Domain, name: &str) -> VirtResult<Self> {
        let name = text(name)?;
        // SAFETY: as in `create`.
        Self::own(unsafe {
            sys::virDomainCheckpointLookupByName(domain.as_ptr(), name.as_ptr(), 0)
        })
    }

    /// The names of all checkpoints libvirt knows of the domain.
    pub(super) fn names(domain: &Domain) -> VirtResult<Vec<String>> {
        let mut list: *mut sys::virDomainCheckpointPtr = ptr::null_mut();
        // SAFETY: on success libvirt stores a malloc'ed array of owned references.
        let count =
            check(unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), &raw mut list, 0) })?;
        let count = usize::try_from(count).unwrap_or(0);
        let mut names = Vec::with_capacity(count);
        for index in 0..count {
            // SAFETY: the array has `count` entries, each a reference that passes to the guard;
            // the name is borrowed from the object and copied while that lives.
            unsafe {
                let checkpoint = Self { raw: *list.add(index) };
                let name = sys::virDomainCheckpointGetName(checkpoint.raw);
                if !name.is_null() {
                    names.push(CStr::from_ptr(name).to_string_lossy().into_owned());
                }
            }
        }
        // SAFETY: the array itself (not its entries, freed above) is the caller's to free.
        unsafe { libc_free(list.cast()) };
        Ok(names)
    }

    /// Its XML (`flags`: `VIR_DOMAIN_CHECKPOINT_XML_*`).
    pub(super) fn xml(&self, flags: u32) -> VirtResult<String> {
        // SAFETY: the checkpoint lives through the call.
        take_string(unsafe { sys::virDomainCheckpointGetXMLDesc(self.raw, flags) })
    }

    /// Deletes it, by `flags` (`VIR_DOMAIN_CHECKPOINT_DELETE_*`) with or without its bitmaps.
    pub(super) fn delete(&self, flags: u32) -> VirtResult<()> {
        // SAFETY: the checkpoint lives through the call.
        check(unsafe { sys::virDomainCheckpointDelete(self.raw, flags) })?;
        Ok(())
    }
}

/// What happened to a domain.
#[derive(Clone, Debug)]
pub(super) enum DomainEvent {
    /// A job ended (`VIR_DOMAIN_EVENT_ID_JOB_COMPLETED`).
    JobCompleted(JobStatus),
    /// An image was written to beyond its threshold (`VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD`), which
    /// is gone by that.
    BeyondThreshold,
    /// A device was unplugged (`VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED`).
    DeviceRemoved,
}

/// A subscription to the events of one domain; ends when dropped. The end of the connection does
/// *not* end it: libvirt keeps the callbacks of a connection that is dead.
pub(super) struct Events {
    connection: Connect,
    callbacks: Vec<c_int>,
    /// The events, oldest first.
    pub(super) receiver: mpsc::Receiver<DomainEvent>,
}

impl Events {
    /// Subscribes to the job ends, thresholds and unplugged devices of `domain`.
    pub(super) fn subscribe(connection: &Connect, domain: &Domain) -> VirtResult<Self> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        let completed: unsafe extern "C" fn(
            sys::virConnectPtr,
            sys::virDomainPtr,
            sys::virTypedParameterPtr,
            c_int,
            *mut c_void,
        ) = on_job_completed;
        let beyond: unsafe extern "C" fn(
            sys::virConnectPtr,
            sys::virDomainPtr,
            *const c_char,
            *const c_char,
            c_ulonglong,
            c_ulonglong,
            *mut c_void,
        ) = on_beyond_threshold;
        let removed: unsafe extern "C" fn(
            sys::virConnectPtr,
            sys::virDomainPtr,
            *const c_char,
            *mut c_void,
        ) = on_device_removed;
        let wanted = [
            (sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, completed as *const ()),
            (sys::VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, beyond as *const ()),
            (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, removed as *const ()),
        ];
        let mut events = Self { connection: connection.clone(), callbacks: Vec::new(), receiver };
        for (event, function) in wanted {
            // SAFETY: libvirt's registration takes every callback cast to the generic type and
            // calls it with the signature the event id stands for, which is the one above.
            let callback = unsafe { std::mem::transmute::<*const (), Generic>(function) };
            let opaque = Box::into_raw(Box::new(sender.clone())).cast::<c_void>();
            let event = c_int::try_from(event).expect("a small id");
            // SAFETY: connection and domain live through the call; `opaque` is freed by
            // `free_sender` when libvirt drops the callback, or below when it did not take it.
            let id = unsafe {
                sys::virConnectDomainEventRegisterAny(
                    connection.as_ptr(),
                    domain.as_ptr(),
                    event,
                    Some(callback),
                    opaque,
                    Some(free_sender),
                )
            };
            match check(id) {
                Ok(callback) => events.callbacks.push(callback),
                Err(error) => {
                    // SAFETY: libvirt took no ownership on failure.
                    unsafe { free_sender(opaque) };
                    return Err(error);
                }
            }
        }
        Ok(events)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        for callback in &self.callbacks {
            // SAFETY: an id registered on this connection, removed once. A failure means that the
            // connection is gone, and the callback with it.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), *callback) };
        }
    }
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

/// # Safety
/// `opaque` is the sender boxed in [`Events::subscribe`], alive until `free_sender`.
unsafe fn send(opaque: *mut c_void, event: DomainEvent) {
    // SAFETY: by contract.
    let sender = unsafe { &*opaque.cast::<mpsc::Sender<DomainEvent>>() };
    if sender.try_send(event).is_err() {
        tracing::debug!("domain event dropped: nobody reads them any more");
    }
}

unsafe extern "C" fn free_sender(opaque: *mut c_void) {
    // SAFETY: called once, by libvirt or by the failed registration, with the boxed sender.
    drop(unsafe { Box::from_raw(opaque.cast::<mpsc::Sender<DomainEvent>>()) });
}

unsafe extern "C" fn on_job_completed(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    parameters: sys::virTypedParameterPtr,
    count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a list of `count` parameters and the opaque pointer we registered.
    unsafe { send(opaque, DomainEvent::JobCompleted(job_parameters(parameters, count))) };
}

unsafe extern "C" fn on_beyond_threshold(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    _: *const c_char,
    _: *const c_char,
    _: c_ulonglong,
    _: c_ulonglong,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the opaque pointer we registered.
    unsafe { send(opaque, DomainEvent::BeyondThreshold) };
}

unsafe extern "C" fn on_device_removed(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    _: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the opaque pointer we registered.
    unsafe { send(opaque, DomainEvent::DeviceRemoved) };
}
