//! Compressing blobs: zstd, as thoroughly as there is time for.
//!
//! A run whose threads have nothing to wait for is bound by the processor, and half of that is the
//! search for matches. It then searches more coarsely: a backup is over sooner, and takes a little more
//! room. Readers see no difference.

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, ParamSwitch, compress_bound};

use crate::error::{Error, Kind, Result};

/// zstd's fastest level that is not negative. Level 3 takes 1.5 times as long for log lines, which it makes
/// no smaller, and 1.7 times for files of Debian, which it makes 6 % smaller (256 KiB at a time, zstd 1.5.7).
const LEVEL: i32 = 1;

/// How thoroughly matches are searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Search {
    /// As level 1 does.
    Thorough,
    /// In steps of four bytes instead of two, and for matches of at least 7 instead of 6, in a larger table:
    /// 1.2 times as fast; what comes out is 2 % larger for log lines, 10 % for files of Debian (as above).
    Coarse,
}

/// A context, and the memory it writes to: fresh memory for every chunk would cost a page fault for
/// each 4 KiB of it.
struct Context {
    search: Search,
    zstd: Compressor<'static>,
    out: Vec<u8>,
}

thread_local! {
    /// Made once per worker thread.
    static CONTEXT: std::cell::RefCell<Option<Context>> = const { std::cell::RefCell::new(None) };
}

impl Context {
    fn new() -> std::io::Result<Self> {
        let mut zstd = Compressor::new(LEVEL)?;
        // Left to itself, zstd takes wider steps for leave to keep what is between matches as it is, and a third
        // more comes out (`ZSTD_literalsCompressionIsDisabled`, zstd 1.5.7).
        zstd.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable))?;
        Ok(Self { search: Search::Thorough, zstd, out: Vec::new() })
    }

    fn search(&mut self, search: Search) -> std::io::Result<()> {
        if search != self.search {
            // Nothing is what the level says (zstd.h, "Compression parameters").
            let (table_bits, match_bytes, step) = match search {
                Search::Thorough => (0, 0, 0),
                Search::Coarse => (15, 7, 3),
            };
            self.zstd.set_parameter(CParameter::HashLog(table_bits))?;
            self.zstd.set_parameter(CParameter::MinMatch(match_bytes))?;
            self.zstd.set_parameter(CParameter::TargetLength(step))?;
            self.search = search;
        }
        Ok(())
    }
}

/// The plaintext compressed, where that saves at least a thirty-second. CPU work.
pub(super) fn compress(plain: &[u8], search: Search) -> Result<Option<Vec<u8>>> {
    let worth = plain.len() - plain.len() / 32;
    let compressed = CONTEXT.with_borrow_mut(|slot| -> std::io::Result<Option<Vec<u8>>> {
        let context = match slot {
            Some(context) => context,
            None => slot.insert(Context::new()?),
        };
        context.search(search)?;
        let out = &mut context.out;
        out.clear();
        out.reserve(compress_bound(plain.len()));
        context.zstd.compress_to_buffer(plain, out)?;
        Ok((out.len() < worth).then(|| out.clone()))
    });
    compressed.map_err(|e| Error::new(Kind::Internal, "zstd cannot compress").source(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of a log, as no two of them are.
    fn text() -> Vec<u8> {
        (0_u64..4000)
            .flat_map(|n| {
                let random = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
                format!("Nov 22 host service[{}]: request {n} took {random} ms\n", random % 97)
                    .into_bytes()
            })
            .collect()
    }

    #[test]
    fn either_search_comes_back_and_the_coarse_one_finds_less() {
        let plain = text();
        let of = |search| compress(&plain, search).unwrap().unwrap();
        let (thorough, coarse) = (of(Search::Thorough), of(Search::Coarse));
        let (least, most) = (thorough.len(), thorough.len() * 6 / 5);
        assert!((least + 1..most).contains(&coarse.len()), "{least} and {}", coarse.len());
        // A thread goes from one to the other and back.
        assert_eq!(of(Search::Thorough), thorough);
        for frame in [thorough, coarse] {
            assert_eq!(zstd::bulk::decompress(&frame, plain.len()).unwrap(), plain);
        }
    }

    #[test]
    fn what_does_not_shrink_stays_as_it_is() {
        let mut noise = vec![0; 64 << 10];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for search in [Search::Thorough, Search::Coarse] {
            assert_eq!(compress(&noise, search).unwrap(), None);
        }
    }
}
