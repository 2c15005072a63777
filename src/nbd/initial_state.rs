//! What an export holds when a client comes, told by our servers to our clients while they negotiate.
//!
//! NBD has no word for it (a proposal of 2020, INIT_ZERO and INIT_SPARSE, came to nothing), so it is
//! a list of meta contexts in a namespace of our own: who lists [`QUERY`] gets one name that says it,
//! or none. Other servers know nothing of it and list nothing; other clients do not ask, and a list
//! of all contexts leaves it out, because it cannot be chosen.
//!
//! It is as true as any answer about an export: for that moment, and for a client that does not let
//! others write meanwhile. Our client asks when it is going to write, and leaves zeroes out where the
//! export has nothing else, without a further query.

use crate::block::{ExtentKind, ExtentMap};

/// What is asked for.
pub(super) const QUERY: &str = "x-vmbackup:initial-state:";

/// What an export holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitialState {
    /// All of it reads as zeroes.
    Zero,
    /// Parts of it read as zeroes, and [`BLOCK_STATUS`](super::wire::command::BLOCK_STATUS) tells
    /// which.
    Sparse,
    /// Nothing of it is known to read as zeroes.
    Dense,
}

impl InitialState {
    /// The name that says it.
    pub(super) fn name(self) -> String {
        let state = match self {
            Self::Zero => "zero",
            Self::Sparse => "sparse",
            Self::Dense => "dense",
        };
        format!("{QUERY}{state}")
    }

    /// What one of a server's names says, if it says this.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        [Self::Zero, Self::Sparse, Self::Dense].into_iter().find(|state| state.name() == name)
    }

    /// What one answer about a disk of `size_bytes` says of all of it.
    pub(super) fn of_map(map: &ExtentMap, size_bytes: u64) -> Option<Self> {
        let (zero, all) = (map.bytes_of(ExtentKind::Zero), map.end() == size_bytes);
        match (zero, all) {
            (0, true) => Some(Self::Dense),
            (0, false) => None,
            (zero, true) if zero == size_bytes => Some(Self::Zero),
            (zero, false) if zero == map.end() => None,
            _ => Some(Self::Sparse),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExtentKind::{Data, Zero};

    #[test]
    fn an_answer_about_a_part_says_only_what_holds_for_all() {
        for (extents, expected) in [
            (&[(10, Zero)][..], Some(InitialState::Zero)),
            (&[(10, Data)], Some(InitialState::Dense)),
            (&[(4, Data), (6, Zero)], Some(InitialState::Sparse)),
            (&[(4, Data), (1, Zero)], Some(InitialState::Sparse)),
            (&[(4, Zero)], None),
            (&[(4, Data)], None),
        ] {
            let mut map = ExtentMap::starting_at(0);
            for (len, kind) in extents {
                map.push(*len, *kind);
            }
            let found = InitialState::of_map(&map, 10);
            assert_eq!(found, expected, "{extents:?}");
            if let Some(state) = found {
                assert_eq!(InitialState::of_name(&state.name()), Some(state));
            }
        }
        assert_eq!(InitialState::of_name(QUERY), None);
    }
}
