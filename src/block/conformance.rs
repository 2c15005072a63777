//! The suite every [`BlockSource`] and [`BlockSink`] runs: the contract of the module head as code.
//!
//! It panics on the first violation, as a test does.

use super::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, ZeroMode};

/// Content with data, zero runs of many lengths and an unaligned tail, the same at every call.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = vec![0; len];
    for (index, block) in out.chunks_mut(4096).enumerate() {
        // Two of five blocks stay zero, in runs of one and two.
        if matches!(index % 5, 1 | 3) || index % 16 == 9 {
            continue;
        }
        for byte in block {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state.to_le_bytes()[3] | 1;
        }
    }
    out
}

/// Checks that `source` holds exactly `expected`: size, extents, reads of many shapes at once.
pub async fn source(source: &dyn BlockSource, expected: &[u8]) {
    let geometry = source.geometry();
    assert_eq!(geometry.size_bytes, expected.len() as u64, "size");
    assert!(geometry.align_bytes.is_power_of_two() && geometry.in_flight >= 1);
    assert!(geometry.request_bytes_max >= geometry.align_bytes);
    let map = all_extents(source).await;
    assert_eq!(map.range(), geometry.range(), "extents cover the disk");
    for extent in map.iter().filter(|extent| extent.kind == ExtentKind::Zero) {
        assert!(
            slice(expected, extent.range).iter().all(|b| *b == 0),
            "{:?} is not zero",
            extent.range
        );
    }
    let unit = geometry.align_bytes.max(512);
    for len in [unit, 3 * unit, 256 << 10, 1 << 20] {
        let len = len.next_multiple_of(geometry.align_bytes).min(geometry.request_bytes_max);
        let reads: Vec<_> = geometry.range().pieces(len).collect();
        for batch in reads.chunks(geometry.in_flight * 4) {
            let mut set = Vec::new();
            for piece in batch {
                let buffer = Buffer::unbudgeted(vec![0x5a; to_usize(piece.len())]);
                set.push((*piece, source.read(piece.offset(), buffer)));
            }
            // Polled in reverse order: replies must find their request by themselves.
            for (piece, read) in set.into_iter().rev() {
                let buffer = read.await.unwrap_or_else(|e| panic!("read {piece:?}: {e:?}"));
                assert!(buffer[..] == *slice(expected, piece), "content of {piece:?} differs");
            }
        }
    }
    window(source, expected).await;
}

/// A read fills its window and nothing else.
async fn window(source: &dyn BlockSource, expected: &[u8]) {
    let align = to_usize(source.geometry().align_bytes);
    if expected.len() < align {
        return;
    }
    let buffer = Buffer::unbudgeted(vec![0x77; 3 * align]).with_window(align..2 * align);
    let buffer = source.read(0, buffer).await.expect("a windowed read").whole();
    assert!(
        buffer[..align].iter().chain(&buffer[2 * align..]).all(|b| *b == 0x77),
        "read left its window"
    );
    assert!(buffer[align..2 * align] == expected[..align], "windowed content differs");
}

/// Writes a pattern with data and zeroes, flushes, and compares with what `content` reads back.
pub async fn sink<F: Future<Output = Vec<u8>>>(sink: &dyn BlockSink, content: impl Fn() -> F) {
    let geometry = sink.geometry();
    let mut expected = pattern(to_usize(geometry.size_bytes));
    let unit = geometry.preferred_bytes.clamp(geometry.align_bytes, geometry.request_bytes_max);
    for (index, piece) in geometry.range().pieces(unit).enumerate() {
        if index % 3 == 1 {
            let mode = if index % 2 == 0 { ZeroMode::Sparse } else { ZeroMode::Allocated };
            sink.zero(piece, mode).await.unwrap_or_else(|e| panic!("zero {piece:?}: {e:?}"));
            expected[span(piece)].fill(0);
        } else {
            let buffer = Buffer::unbudgeted(expected[span(piece)].to_vec());
            sink.write(piece.offset(), buffer)
                .await
                .unwrap_or_else(|e| panic!("write {piece:?}: {e:?}"));
        }
    }
    sink.flush().await.expect("flush");
    assert!(content().await == expected, "what was written does not read back");
}

/// The whole map of a source, asked for piecewise, with each answer checked.
pub async fn all_extents(source: &dyn BlockSource) -> ExtentMap {
    let range = source.geometry().range();
    let mut map = ExtentMap::starting_at(0);
    while map.end() < range.end() {
        let rest = ByteRange::between(map.end(), range.end());
        let part = source.extents(rest).await.unwrap_or_else(|e| panic!("extents {rest:?}: {e:?}"));
        assert_eq!(part.start(), rest.offset(), "a map starts where it was asked to");
        assert!(
            !part.is_empty() && part.end() <= rest.end(),
            "a map makes progress within {rest:?}"
        );
        for extent in part.iter() {
            map.push(extent.range.len(), extent.kind);
        }
    }
    map
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    to_usize(range.offset())..to_usize(range.end())
}

fn slice(bytes: &[u8], range: ByteRange) -> &[u8] {
    &bytes[span(range)]
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("test disks fit the address space")
}
