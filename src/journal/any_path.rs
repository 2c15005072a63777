//! Paths in journals: text where they are text, else bytes. For `#[serde(with = …)]`; a file name on
//! Linux is any bytes, and one that could not be written down could not be undone.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A path on its way to or from a file.
struct Any<'a>(Cow<'a, Path>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written<'a> {
    Text(Cow<'a, str>),
    Bytes(Cow<'a, [u8]>),
}

impl<'a> Any<'a> {
    fn of(path: &'a Path) -> Self {
        Self(Cow::Borrowed(path))
    }
}

impl Serialize for Any<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => Written::Text(text.into()),
            None => Written::Bytes(OsStr::as_bytes(self.0.as_os_str()).into()),
        }
        .serialize(to)
    }
}

impl<'de> Deserialize<'de> for Any<'_> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(Cow::Owned(match Written::deserialize(from)? {
            Written::Text(text) => text.into_owned().into(),
            Written::Bytes(bytes) => OsString::from_vec(bytes.into_owned()).into(),
        })))
    }
}

pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    Any::of(path).serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    Ok(Any::deserialize(from)?.0.into_owned())
}

/// One that may be none.
pub(super) mod option {
    use super::{Any, Deserialize, Deserializer, PathBuf, Serialize, Serializer};

    #[allow(clippy::ref_option, reason = "what serde calls")]
    pub(in super::super) fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        path.as_deref().map(Any::of).serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<Any<'_>>::deserialize(from)?.map(|any| any.0.into_owned()))
    }
}

/// Several.
pub(super) mod list {
    use super::{Any, Deserialize, Deserializer, PathBuf, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(
        paths: &[PathBuf],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(paths.iter().map(|path| Any::of(path)))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<PathBuf>, D::Error> {
        let list = Vec::<Any<'_>>::deserialize(from)?;
        Ok(list.into_iter().map(|any| any.0.into_owned()).collect())
    }
}

/// Images with their formats.
pub(super) mod images {
    use super::{Any, Deserialize, Deserializer, PathBuf, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(
        images: &[(PathBuf, String)],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(images.iter().map(|(path, format)| (Any::of(path), format)))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<(PathBuf, String)>, D::Error> {
        let list = Vec::<(Any<'_>, String)>::deserialize(from)?;
        Ok(list.into_iter().map(|(any, format)| (any.0.into_owned(), format)).collect())
    }
}
