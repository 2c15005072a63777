//! Writing past the page cache (`O_DIRECT`): for bulk data that nobody reads soon.
//!
//! A backup or restore that goes through the page cache pays for a copy of every byte and pushes
//! out what the host's guests and their QEMU have there. Only on file systems whose direct writes
//! are well known; everywhere else, and for what is not aligned, the cached way stays. Both may be
//! mixed on one file as long as no page is written both ways at once (open(2), NOTES): whoever uses
//! this writes each byte once.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Offsets and lengths of direct writes are multiples of this: the largest logical block size of
/// the disks we run on, and the block size of their file systems.
const BLOCK_BYTES: usize = 4096;

/// Memory of direct writes begins at multiples of this: what disks ask for (Linux before 6.0: their
/// logical block size; one of 4096 then refuses, which is found out at the first write).
pub const MEMORY_BYTES: usize = 512;

/// File systems (`f_type` of statfs(2)): ext2, ext3 and ext4; XFS. Network file systems would make
/// each direct write wait for the server's disk, others copy all the same (Btrfs with compression).
const FILE_SYSTEMS: [u64; 2] = [0xef53, 0x5846_5342];

/// A second way into an open file.
#[derive(Debug)]
pub struct Bypass {
    direct: File,
    /// The file system or device turned out not to take such writes.
    refused: AtomicBool,
}

impl Bypass {
    /// The way past the cache into `file`, if it is a block device or on a file system with a good
    /// one. Never fails: there
    /// is always the way through the cache.
    pub fn of(file: &File) -> Option<Self> {
        let device = file.metadata().ok()?.file_type().is_block_device();
        let magic = u64::try_from(rustix::fs::fstatfs(file).ok()?.f_type);
        if !device && !magic.is_ok_and(|magic| FILE_SYSTEMS.contains(&magic)) {
            return None;
        }
        // Opened anew, because the flag belongs to the open file and not to the descriptor.
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::DIRECT.bits().cast_signed();
        let direct = OpenOptions::new().write(true).custom_flags(flags).open(same).ok()?;
        Some(Self { direct, refused: AtomicBool::new(false) })
    }

    /// Whether writes have not been refused yet.
    pub fn works(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Writes as much of the beginning of `bytes` as can go this way and returns how much that was;
    /// the rest is for the cached way. Durable, like that, after a sync of the file.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let len = bytes.len() - bytes.len() % BLOCK_BYTES;
        let aligned = offset.is_multiple_of(BLOCK_BYTES as u64)
            && bytes.as_ptr().align_offset(MEMORY_BYTES) == 0;
        if len == 0 || !aligned || !self.works() {
            return Ok(0);
        }
        match self.direct.write_all_at(&bytes[..len], offset) {
            Ok(()) => Ok(len),
            // What of it was written is written again, the same.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                tracing::debug!("direct writes are refused here; going through the page cache");
                self.refused.store(true, Ordering::Relaxed);
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }
}

/// Gathers bytes until there are enough for a direct write, in memory that suits one.
#[derive(Debug)]
pub struct Gather {
    /// `start` bytes of padding, then what was gathered.
    memory: Vec<u8>,
    start: usize,
    capacity: usize,
}

impl Gather {
    /// Room for `capacity` bytes, a multiple of [`BLOCK_BYTES`].
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0 && capacity.is_multiple_of(BLOCK_BYTES), "whole blocks");
        let mut memory: Vec<u8> = Vec::with_capacity(capacity + MEMORY_BYTES);
        let start = memory.as_ptr().align_offset(MEMORY_BYTES).min(MEMORY_BYTES);
        memory.resize(start, 0);
        Self { memory, start, capacity }
    }

    /// Takes from the beginning of `bytes` what there is room for, and returns the rest.
    pub fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let room = self.capacity - self.bytes().len();
        let (now, rest) = bytes.split_at(room.min(bytes.len()));
        self.memory.extend_from_slice(now);
        rest
    }

    /// Whether there is no room left.
    pub fn is_full(&self) -> bool {
        self.bytes().len() == self.capacity
    }

    /// What was gathered.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..]
    }

    /// Room for all again.
    pub fn clear(&mut self) {
        self.memory.truncate(self.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_bytes_come_out_in_order_in_aligned_memory() {
        let mut gather = Gather::new(2 * BLOCK_BYTES);
        let bytes: Vec<u8> = (0..20_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let (mut out, mut rest) = (Vec::new(), &bytes[..]);
        while !rest.is_empty() {
            rest = gather.fill(rest);
            if gather.is_full() {
                assert_eq!(gather.bytes().as_ptr().align_offset(MEMORY_BYTES), 0);
                out.extend_from_slice(gather.bytes());
                gather.clear();
            }
        }
        out.extend_from_slice(gather.bytes());
        assert_eq!(out, bytes);
    }

    #[test]
    fn what_is_not_aligned_is_left_to_the_cached_way() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        // Elsewhere there is no bypass, which is all that can be said there.
        let Some(bypass) = Bypass::of(&file) else { return };
        let mut gather = Gather::new(4 * BLOCK_BYTES);
        gather.fill(&[7; 4 * BLOCK_BYTES]);
        let bytes = gather.bytes();
        assert_eq!(bypass.write_at(bytes, 1).unwrap(), 0);
        assert_eq!(bypass.write_at(&bytes[1..], 0).unwrap(), 0);
        assert_eq!(bypass.write_at(&bytes[..BLOCK_BYTES - 1], 0).unwrap(), 0);
        assert_eq!(bypass.write_at(&bytes[..BLOCK_BYTES + 9], 4096).unwrap(), BLOCK_BYTES);
        let mut back = vec![0; BLOCK_BYTES];
        file.read_exact_at(&mut back, 4096).unwrap();
        assert_eq!(back, &bytes[..BLOCK_BYTES]);
    }
}
