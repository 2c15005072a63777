//! A store in memory: for tests and simulation, with a clock and faults that the test decides on.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use super::{
    BlockingObjects, ObjectInfo, ObjectName, ObjectStore, ObjectWriter, PAGE_MAX, ReadRange,
    Reservation, StoreError, StoreResult,
};
use crate::block::Waited;
use crate::clock::{Clock, Timestamp};

/// A call to the store, as a fault hook sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// An object is begun.
    Create(ObjectName),
    /// Bytes are appended.
    Write(ObjectName),
    /// An object is finished.
    Finish(ObjectName),
    /// An object is read.
    Read(ObjectName),
    /// An object is asked for.
    Stat(ObjectName),
    /// Objects are listed.
    List(String),
    /// An object is deleted.
    Delete(ObjectName),
    /// The clock is asked.
    Now,
    /// Leftovers, of which there are none, are removed.
    Sweep,
}

/// What a fault hook makes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and has no effect.
    Fail,
    /// The call takes effect and yet fails: the answer got lost.
    LoseAnswer,
    /// The store is full: the call fails and has no effect.
    Full,
    /// The store does not answer: the call is given up, and has had no effect by then.
    Silent,
}

type Hook = Arc<dyn Fn(&Operation) -> Option<Fault> + Send + Sync>;

/// A store in memory. Clones share the objects.
#[derive(Clone)]
pub struct MemoryStore {
    clock: Arc<dyn Clock>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    objects: BTreeMap<ObjectName, (Arc<Vec<u8>>, Timestamp)>,
    hook: Option<Hook>,
    /// What objects may take together, if there is a bound.
    capacity_bytes: Option<u64>,
    /// The same, told to nobody.
    quota_bytes: Option<u64>,
    /// Bytes of objects that are being written.
    writing_bytes: u64,
}

impl MemoryStore {
    /// An empty store with `clock` as its own clock.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, shared: Arc::default() }
    }

    /// Asks `hook` about every call from now on.
    pub fn set_fault_hook(
        &self,
        hook: impl Fn(&Operation) -> Option<Fault> + Send + Sync + 'static,
    ) {
        self.lock().hook = Some(Arc::new(hook));
    }

    /// No more faults.
    pub fn clear_fault_hook(&self) {
        self.lock().hook = None;
    }

    /// From now on the store is full at so many bytes, those of unfinished objects included.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity_bytes = Some(bytes);
    }

    /// The same, but nobody is told how much room there is.
    pub fn set_quota(&self, bytes: u64) {
        self.lock().quota_bytes = Some(bytes);
    }

    /// What all objects take, unfinished ones included.
    pub fn used_bytes(&self) -> u64 {
        self.lock().used_bytes()
    }

    /// What of that is unfinished or held.
    pub fn unfinished_bytes(&self) -> u64 {
        self.lock().writing_bytes
    }

    /// Damages or replaces an object behind everybody's back.
    pub fn overwrite(&self, name: &ObjectName, bytes: Vec<u8>) {
        let stored = self.clock.now();
        self.lock().objects.insert(name.clone(), (Arc::new(bytes), stored));
    }

    /// Breaks the promise of a durable object: it is gone.
    pub fn lose(&self, name: &ObjectName) {
        self.lock().objects.remove(name);
    }

    /// Breaks the promise of a whole object: half of it is there.
    pub fn tear(&self, name: &ObjectName) {
        if let Some((bytes, _)) = self.lock().objects.get_mut(name) {
            *bytes = Arc::new(bytes[..bytes.len() / 2].to_vec());
        }
    }

    /// Every name there is.
    pub fn names(&self) -> Vec<ObjectName> {
        self.lock().objects.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Held for single map operations only, which leave the map whole when they panic.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `effect` as the hook allows.
    fn call<T>(
        &self,
        operation: &Operation,
        effect: impl FnOnce(&mut Shared) -> StoreResult<T>,
    ) -> StoreResult<T> {
        // The hook is called without the lock, so that it may look at the store.
        let hook = self.lock().hook.clone();
        let fault = hook.and_then(|hook| hook(operation));
        let what = || format!("{operation:?} in {}", self.describe());
        match fault {
            None => effect(&mut self.lock()),
            Some(Fault::Fail) => {
                Err(StoreError::io(what(), io::Error::other("a fault was injected")))
            }
            Some(Fault::Full) => {
                Err(StoreError::io(what(), io::Error::from(io::ErrorKind::StorageFull)))
            }
            Some(Fault::Silent) => {
                Err(StoreError::Silent { store: self.describe(), limit: Duration::ZERO })
            }
            Some(Fault::LoseAnswer) => {
                effect(&mut self.lock())?;
                Err(StoreError::io(what(), io::Error::other("the answer got lost")))
            }
        }
    }
}

impl MemoryStore {
    fn read_now(&self, name: &ObjectName, range: ReadRange) -> StoreResult<Vec<u8>> {
        let object =
            self.call(&Operation::Read(name.clone()), |s| s.find(name).map(|o| Arc::clone(&o.0)))?;
        let (offset, len) = range.resolve(name, object.len() as u64)?;
        let offset = usize::try_from(offset).expect("resolved within an object in memory");
        Ok(object[offset..offset + len].to_vec())
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("objects", &self.lock().objects.len()).finish()
    }
}

#[async_trait]
impl ObjectStore for MemoryStore {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    async fn create(&self, name: &ObjectName) -> StoreResult<Box<dyn ObjectWriter>> {
        self.call(&Operation::Create(name.clone()), |_| Ok(()))?;
        Ok(Box::new(Writer {
            store: self.clone(),
            name: name.clone(),
            bytes: Vec::new(),
            room: Room::none(self),
        }))
    }

    async fn read(&self, name: &ObjectName, range: ReadRange) -> StoreResult<Vec<u8>> {
        self.read_now(name, range)
    }

    async fn stat(&self, name: &ObjectName) -> StoreResult<ObjectInfo> {
        self.call(&Operation::Stat(name.clone()), |s| Ok(info(name, s.find(name)?)))
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectName>,
        max: usize,
    ) -> StoreResult<Vec<ObjectInfo>> {
        self.call(&Operation::List(prefix.to_owned()), |s| {
            let from = after.map_or(Bound::Unbounded, Bound::Excluded);
            let objects = s.objects.range::<ObjectName, _>((from, Bound::Unbounded));
            Ok(objects
                .skip_while(|(name, _)| name.as_str() < prefix)
                .take_while(|(name, _)| name.as_str().starts_with(prefix))
                .take(max.min(PAGE_MAX))
                .map(|(name, object)| info(name, object))
                .collect())
        })
    }

    async fn delete(&self, name: &ObjectName) -> StoreResult<()> {
        self.call(&Operation::Delete(name.clone()), |s| {
            s.find(name)?;
            s.objects.remove(name);
            Ok(())
        })
    }

    async fn now(&self) -> StoreResult<Timestamp> {
        self.call(&Operation::Now, |_| Ok(self.clock.now()))
    }

    async fn sweep(&self, _before: Timestamp) -> StoreResult<u64> {
        self.call(&Operation::Sweep, |_| Ok(0))
    }

    async fn reserve(&self, bytes: u64) -> StoreResult<Box<dyn Reservation>> {
        let mut room = Room::none(self);
        let mut shared = self.lock();
        let taken = room.grow(&mut shared, bytes);
        drop(shared);
        taken.map(|()| Box::new(room) as Box<dyn Reservation>)
    }

    async fn room_bytes(&self) -> StoreResult<Option<u64>> {
        Ok(self.lock().room_bytes())
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingObjects>> {
        Some(Arc::new(self.clone()))
    }
}

impl BlockingObjects for MemoryStore {
    fn read_at(&self, name: &ObjectName, offset: u64, bytes: &mut [u8]) -> StoreResult<Waited> {
        let range = ReadRange::Exact { offset, len: bytes.len() as u64 };
        bytes.copy_from_slice(&self.read_now(name, range)?);
        Ok(Waited::No)
    }
}

impl Shared {
    fn used_bytes(&self) -> u64 {
        let objects = self.objects.values().map(|(bytes, _)| bytes.len() as u64);
        objects.sum::<u64>() + self.writing_bytes
    }

    fn room_bytes(&self) -> Option<u64> {
        self.capacity_bytes.map(|capacity| capacity.saturating_sub(self.used_bytes()))
    }

    fn find(&self, name: &ObjectName) -> StoreResult<&(Arc<Vec<u8>>, Timestamp)> {
        self.objects.get(name).ok_or_else(|| StoreError::NotFound { name: name.clone() })
    }
}

fn info(name: &ObjectName, object: &(Arc<Vec<u8>>, Timestamp)) -> ObjectInfo {
    ObjectInfo { name: name.clone(), size_bytes: object.0.len() as u64, stored: object.1 }
}

/// Room that is taken.
struct Room {
    store: MemoryStore,
    bytes: u64,
}

impl Room {
    fn none(store: &MemoryStore) -> Self {
        Self { store: store.clone(), bytes: 0 }
    }

    /// Takes so many bytes more.
    fn grow(&mut self, shared: &mut Shared, bytes: u64) -> StoreResult<()> {
        let bounds = [shared.capacity_bytes, shared.quota_bytes];
        let more = shared.used_bytes() + bytes;
        if bounds.into_iter().flatten().any(|bound| more > bound) {
            let full = io::Error::from(io::ErrorKind::StorageFull);
            return Err(StoreError::io(format!("taking {bytes} bytes"), full));
        }
        shared.writing_bytes += bytes;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.store.lock().writing_bytes -= self.bytes;
    }
}

#[async_trait]
impl Reservation for Room {
    async fn release(self: Box<Self>) -> StoreResult<()> {
        Ok(())
    }
}

struct Writer {
    store: MemoryStore,
    name: ObjectName,
    bytes: Vec<u8>,
    room: Room,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: &[u8]) -> StoreResult<()> {
        let store = self.store.clone();
        store.call(&Operation::Write(self.name.clone()), |s| {
            self.room.grow(s, bytes.len() as u64)?;
            self.bytes.extend_from_slice(bytes);
            Ok(())
        })
    }

    async fn finish(mut self: Box<Self>) -> StoreResult<ObjectInfo> {
        let (store, name) = (self.store.clone(), self.name.clone());
        let bytes = std::mem::take(&mut self.bytes);
        let stored = store.clock.now();
        store.call(&Operation::Finish(name.clone()), |s| {
            if s.objects.contains_key(&name) {
                return Err(StoreError::AlreadyExists { name: name.clone() });
            }
            s.writing_bytes -= std::mem::take(&mut self.room.bytes);
            let object = (Arc::new(bytes), stored);
            let info = info(&name, &object);
            s.objects.insert(name.clone(), object);
            Ok(info)
        })
    }

    async fn abort(self: Box<Self>) -> StoreResult<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::repo::store::conformance;

    fn empty() -> MemoryStore {
        MemoryStore::new(Arc::new(SystemClock))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn keeps_the_promises_of_a_store() {
        conformance::run(&|| Arc::new(empty())).await;
    }

    #[tokio::test]
    async fn a_lost_answer_leaves_the_object_and_a_failure_leaves_nothing() {
        let store = empty();
        let name = ObjectName::config();
        store.set_fault_hook(|op| matches!(op, Operation::Finish(_)).then_some(Fault::Fail));
        assert!(store.put(&name, vec![1]).await.is_err());
        assert!(store.stat(&name).await.unwrap_err().is_not_found());
        store.set_fault_hook(|op| matches!(op, Operation::Finish(_)).then_some(Fault::LoseAnswer));
        assert!(store.put(&name, vec![1]).await.is_err());
        assert_eq!(store.stat(&name).await.unwrap().size_bytes, 1);
    }
}
