//! Names of objects: the few fixed folders of a repository, validated once.
//!
//! A name is at most [`NAME_BYTES_MAX`] bytes of `a-z 0-9 . - _ /`, begins with one of the
//! [`Folder`]s (or is `config`) and holds no empty, `.` or `..` part, so that it can be a path below
//! a directory, a key of an object store and a line of text without any escaping. Lower case only:
//! SMB and some local file systems fold case.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::vm::{PointId, Uuid};

/// Longest name; each part stays far below the 255 bytes of common file systems.
pub const NAME_BYTES_MAX: usize = 200;

/// Where objects of one sort live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Folder {
    /// `keys/<slot>`: wrapped copies of the master key.
    Keys,
    /// `packs/<2 hex>/<pack id>`: chunks and tree nodes.
    Packs,
    /// `index/<segment id>`: where each blob lies.
    Index,
    /// `points/<domain uuid>/<sequence>-<point id>`: manifests, the commit points.
    Points,
    /// `runs/<run id>/<n>`: writers and collectors at work, and their renewals.
    Runs,
    /// `tombstones/<point id>`: forgotten points.
    Tombstones,
    /// `condemned/<id>`: lists of what the collector is about to delete.
    Condemned,
    /// `catalog/<segment id>`: summaries of points.
    Catalog,
    /// `damaged/<pack id>`: packs in which damage was found.
    Damaged,
}

impl Folder {
    /// Every folder, in the order of their names.
    pub const ALL: [Self; 9] = [
        Self::Catalog,
        Self::Condemned,
        Self::Damaged,
        Self::Index,
        Self::Keys,
        Self::Packs,
        Self::Points,
        Self::Runs,
        Self::Tombstones,
    ];

    /// The folder's prefix, with its slash.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Keys => "keys/",
            Self::Packs => "packs/",
            Self::Index => "index/",
            Self::Points => "points/",
            Self::Runs => "runs/",
            Self::Tombstones => "tombstones/",
            Self::Condemned => "condemned/",
            Self::Catalog => "catalog/",
            Self::Damaged => "damaged/",
        }
    }
}

/// The name of an object.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectName(String);

impl ObjectName {
    /// Checks a name that came from outside (a listing, a manifest); `None` when it breaks a rule.
    pub fn parse(text: &str) -> Option<Self> {
        let known = text == "config" || Folder::ALL.iter().any(|f| text.starts_with(f.prefix()));
        let parts_fine = text.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
        let letters_fine = text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_' | b'/'));
        (known && parts_fine && letters_fine && text.len() <= NAME_BYTES_MAX)
            .then(|| Self(text.to_owned()))
    }

    /// The repository's configuration.
    pub fn config() -> Self {
        Self("config".to_owned())
    }

    /// An object of `folder`.
    ///
    /// # Panics
    /// When `rest` breaks the rules: names are made by this crate, from ids and numbers.
    pub fn new(folder: Folder, rest: &str) -> Self {
        let text = format!("{}{rest}", folder.prefix());
        Self::parse(&text).unwrap_or_else(|| panic!("invalid object name '{text}'"))
    }

    /// A pack.
    pub fn pack(id: &[u8; 16]) -> Self {
        let hex = hex(id);
        Self(format!("packs/{}/{hex}", &hex[..2]))
    }

    /// A manifest: `sequence` orders the points of a domain.
    pub fn point(domain: Uuid, sequence: u64, id: PointId) -> Self {
        Self(format!("points/{}/{sequence:016x}-{id}", domain.hyphenated()))
    }

    /// The prefix of all manifests of a domain.
    pub fn points_of(domain: Uuid) -> String {
        format!("points/{}/", domain.hyphenated())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last part of the name.
    pub fn last(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

/// Lower-case hex digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string never fails");
        text
    })
}

/// The `N` bytes that `text` spells in lower-case hex digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits_fine = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if text.len() != N * 2 || !digits_fine {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.0
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("'{text}' is not an object name"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_repository_or_fold_case_are_refused() {
        for text in [
            "",
            "config/",
            "config/x",
            "/config",
            "keys",
            "keys/",
            "keys/..",
            "keys/../config",
            "keys//x",
            "keys/.x",
            "keys/A",
            "keys/a b",
            "other/x",
            "keys/ä",
            "keys/a\0",
        ] {
            assert_eq!(ObjectName::parse(text), None, "{text}");
        }
        assert_eq!(ObjectName::parse(&format!("keys/{}", "a".repeat(200))), None);
        for text in ["config", "keys/clear-00", "packs/ab/abcd", "runs/00ff/0"] {
            assert!(ObjectName::parse(text).is_some(), "{text}");
        }
    }

    #[test]
    fn point_names_sort_by_sequence() {
        let domain = Uuid::from_u128(7);
        let earlier = ObjectName::point(domain, 9, PointId([0xff; 16]));
        let later = ObjectName::point(domain, 10, PointId([0; 16]));
        assert!(earlier < later);
        assert!(earlier.as_str().starts_with(&ObjectName::points_of(domain)));
    }

    #[test]
    fn hex_reads_back_and_refuses_upper_case() {
        assert_eq!(from_hex::<2>(&hex(&[0x0f, 0xa0])), Some([0x0f, 0xa0]));
        assert_eq!(from_hex::<2>("0FA0"), None);
        assert_eq!(from_hex::<2>("0fa"), None);
    }
}
