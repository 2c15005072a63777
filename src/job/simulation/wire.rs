//! A simulated process's way to a store: every call may fail, lose its answer, or be its last.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use crate::clock::Timestamp;
use crate::platform::simulated::life::{Happening, Life, Place};
use crate::repo::store::memory::MemoryStore;
use crate::repo::store::{
    Folder, ObjectInfo, ObjectName, ObjectStore, ObjectWriter, ReadRange, StoreError, StoreResult,
};

/// A store, with what it called durable in the order in which it did.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) store: Arc<MemoryStore>,
    finished: Arc<Mutex<Vec<ObjectName>>>,
}

impl Kept {
    pub(super) fn new(store: Arc<MemoryStore>) -> Self {
        Self { store, finished: Arc::default() }
    }

    /// The store breaks its promise: the newest object that is more than a lease is torn, or gone, or
    /// the index is torn.
    pub(super) fn meet(&self, happening: Happening) {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        let lease = Folder::Runs.prefix();
        let newest = finished.iter().rev().find(|name| !name.as_str().starts_with(lease));
        match (happening, newest) {
            (Happening::TornWrite, Some(name)) => self.store.tear(name),
            (Happening::LostObject, Some(name)) => self.store.lose(name),
            (Happening::TornIndex, _) => {
                let is_segment =
                    |name: &&ObjectName| folder_of(name.as_str()) == Some(Folder::Index);
                finished.iter().filter(is_segment).for_each(|name| self.store.tear(name));
            }
            _ => {}
        }
    }
}

/// The way of one process to a store.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) kept: Kept,
    pub(super) life: Arc<Life>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kept.store.fmt(f)
    }
}

impl Wire {
    async fn call<T>(
        &self,
        place: Place,
        effect: impl Future<Output = StoreResult<T>>,
    ) -> StoreResult<T> {
        let broken = |why| StoreError::io("a call", io::Error::other(why));
        self.life.call(place, effect, broken).await
    }
}

/// Names of an operation on each sort of object.
macro_rules! places {
    ($operation:literal, $name:expr) => {
        match folder_of($name) {
            None => concat!("store: ", $operation, " config"),
            Some(Folder::Keys) => concat!("store: ", $operation, " keys"),
            Some(Folder::Packs) => concat!("store: ", $operation, " packs"),
            Some(Folder::Index) => concat!("store: ", $operation, " index"),
            Some(Folder::Points) => concat!("store: ", $operation, " points"),
            Some(Folder::Runs) => concat!("store: ", $operation, " runs"),
            Some(Folder::Tombstones) => concat!("store: ", $operation, " tombstones"),
            Some(Folder::Condemned) => concat!("store: ", $operation, " condemned"),
            Some(Folder::Catalog) => concat!("store: ", $operation, " catalog"),
            Some(Folder::Damaged) => concat!("store: ", $operation, " damaged"),
        }
    };
}

fn folder_of(name: &str) -> Option<Folder> {
    Folder::ALL.into_iter().find(|folder| name.starts_with(folder.prefix()))
}

#[async_trait]
impl ObjectStore for Wire {
    fn describe(&self) -> String {
        self.kept.store.describe()
    }

    async fn create(&self, name: &ObjectName) -> StoreResult<Box<dyn ObjectWriter>> {
        let place = places!("create", name.as_str());
        let inner = self.call(place, self.kept.store.create(name)).await?;
        Ok(Box::new(Writer { inner, name: name.clone(), wire: self.clone() }))
    }

    async fn read(&self, name: &ObjectName, range: ReadRange) -> StoreResult<Vec<u8>> {
        self.call(places!("read", name.as_str()), self.kept.store.read(name, range)).await
    }

    async fn stat(&self, name: &ObjectName) -> StoreResult<ObjectInfo> {
        self.call(places!("stat", name.as_str()), self.kept.store.stat(name)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectInfo>> {
        self.call(places!("list", prefix), self.kept.store.list(prefix, after, max)).await
    }

    async fn delete(&self, name: &ObjectName) -> StoreResult<()> {
        self.call(places!("delete", name.as_str()), self.kept.store.delete(name)).await
    }

    async fn now(&self) -> StoreResult<Timestamp> {
        self.call("store: now", self.kept.store.now()).await
    }
}

struct Writer {
    inner: Box<dyn ObjectWriter>,
    name: ObjectName,
    wire: Wire,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: &[u8]) -> StoreResult<()> {
        let place = places!("write", self.name.as_str());
        self.wire.call(place, self.inner.write(bytes)).await
    }

    async fn finish(self: Box<Self>) -> StoreResult<ObjectInfo> {
        let place = places!("finish", self.name.as_str());
        let Self { inner, name, wire } = *self;
        let finish = async {
            let info = inner.finish().await?;
            let mut finished = wire.kept.finished.lock().unwrap_or_else(PoisonError::into_inner);
            finished.push(name.clone());
            Ok(info)
        };
        wire.call(place, finish).await
    }

    async fn abort(self: Box<Self>) -> StoreResult<()> {
        self.wire.call("store: abort", self.inner.abort()).await
    }
}
