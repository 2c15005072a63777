//! Where the filters of an index are kept: in memory as far as that is allowed, in a file beyond.
//!
//! Ten bits per chunk are little until there are hundreds of millions of chunks. Filters past
//! [`FILTER_BYTES_MAX`] go to a file without a name, of which the kernel keeps in memory what it has
//! room for: a probe is then a read of eight bytes, and the second one in the middle ends the search
//! for a new chunk. Where no such file can be made those filters admit everything: look-ups read
//! blocks of the index instead, which is slow and right.
//!
//! The file only grows: a process that merges or refreshes leaves behind in it what it replaced.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::filter::{Filter, probes};
use crate::repo::seal::BlobId;

/// Most memory for filters: those of 80 million chunks, 20 to 320 TiB of them.
pub const FILTER_BYTES_MAX: usize = 96 << 20;

/// On a disk, unlike `/tmp` on many systems (file-hierarchy(7)).
const DIRECTORY: &str = "/var/tmp";

/// Room for the filters of one index.
#[derive(Debug)]
pub struct FilterSpace {
    bytes_max: usize,
    directory: PathBuf,
    // Held for arithmetic and to make the file, never across an await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In memory.
    used_bytes: usize,
    file: Option<Arc<File>>,
    end: u64,
}

impl FilterSpace {
    /// Room for `bytes_max` in memory.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, directory: DIRECTORY.into(), state: Mutex::default() }
    }

    /// Takes in a filter. Writes a file if it must.
    pub fn place(self: &Arc<Self>, filter: Filter) -> PlacedFilter {
        let bytes = filter.bytes();
        let mut state = self.lock();
        let place = if state.used_bytes + bytes <= self.bytes_max {
            state.used_bytes += bytes;
            Place::Memory(filter)
        } else {
            drop(state);
            self.write(&filter).unwrap_or_else(|error| {
                let directory = self.directory.display();
                tracing::warn!(%error, %directory, "no room for a filter of the index: look-ups are slow");
                Place::Nowhere
            })
        };
        PlacedFilter { place, space: Arc::clone(self) }
    }

    /// Bytes of the filters in memory.
    pub fn used_bytes(&self) -> usize {
        self.lock().used_bytes
    }

    fn write(&self, filter: &Filter) -> io::Result<Place> {
        let bytes = filter.encode();
        let (file, offset) = {
            let mut state = self.lock();
            let file = match &state.file {
                Some(file) => Arc::clone(file),
                None => {
                    Arc::clone(state.file.insert(Arc::new(tempfile::tempfile_in(&self.directory)?)))
                }
            };
            let offset = state.end;
            state.end += bytes.len() as u64;
            (file, offset)
        };
        file.write_all_at(&bytes, offset)?;
        Ok(Place::File { file, offset, bits: bytes.len() as u64 * 8 })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A filter in its place.
#[derive(Debug)]
pub struct PlacedFilter {
    place: Place,
    space: Arc<FilterSpace>,
}

#[derive(Debug)]
enum Place {
    Memory(Filter),
    File { file: Arc<File>, offset: u64, bits: u64 },
    Nowhere,
}

impl PlacedFilter {
    /// Whether `id` may be in the set.
    pub fn may_contain(&self, id: &BlobId) -> bool {
        match &self.place {
            Place::Memory(filter) => filter.may_contain(id),
            Place::File { file, offset, bits } => {
                probes(id, *bits).all(|bit| is_set(file, *offset, bit).unwrap_or(true))
            }
            Place::Nowhere => true,
        }
    }
}

fn is_set(file: &File, offset: u64, bit: u64) -> io::Result<bool> {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, offset + bit / 64 * 8)?;
    Ok(u64::from_le_bytes(word) >> (bit % 64) & 1 == 1)
}

impl Drop for PlacedFilter {
    fn drop(&mut self) {
        if let Place::Memory(filter) = &self.place {
            self.space.lock().used_bytes -= filter.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> BlobId {
        BlobId(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    fn filter(ids: std::ops::Range<u64>) -> Filter {
        let mut filter = Filter::for_count(ids.end - ids.start);
        ids.for_each(|n| filter.insert(&id(n)));
        filter
    }

    #[test]
    fn filters_beyond_the_bound_answer_from_a_file_as_they_did_in_memory() {
        let space = Arc::new(FilterSpace::new(3000));
        let placed: Vec<_> =
            (0..10).map(|n| space.place(filter(n * 1000..(n + 1) * 1000))).collect();
        assert!((1..=3000).contains(&space.used_bytes()), "{}", space.used_bytes());
        for (n, placed) in (0..).zip(&placed) {
            let memory = filter(n * 1000..(n + 1) * 1000);
            assert!((0..20_000).all(|i| placed.may_contain(&id(i)) == memory.may_contain(&id(i))));
        }
        drop(placed);
        assert_eq!(space.used_bytes(), 0, "memory is given back");
    }

    #[test]
    fn without_a_file_a_filter_admits_everything() {
        let space = FilterSpace { directory: "/nonexistent".into(), ..FilterSpace::new(0) };
        let placed = Arc::new(space).place(filter(0..10));
        assert!((0..100).all(|n| placed.may_contain(&id(n))));
    }
}
