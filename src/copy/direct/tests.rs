//! What threads that read and write do when one of them fails or hangs.

use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;

use async_trait::async_trait;

use super::super::copy;
use super::super::tests::{options, run};
use super::*;
use crate::block::file::{Access, Existing, FileSource, NewFile};
use crate::block::{BlockSink, BlockSource, Budget, ExtentMap, Geometry, ZeroMode};

/// A file whose reads go through another door.
struct Behind {
    inner: FileSource,
    door: Arc<dyn BlockingRead>,
}

#[async_trait]
impl BlockSource for Behind {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.inner.extents(range).await
    }

    async fn read(&self, _offset: u64, _buffer: Buffer) -> Result<Buffer> {
        unreachable!("files are copied by threads")
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingRead>> {
        Some(Arc::clone(&self.door))
    }
}

/// Reads fail from the middle of the disk on.
struct Failing {
    inner: Arc<dyn BlockingRead>,
    from: u64,
}

impl BlockingRead for Failing {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<Waited> {
        if offset >= self.from {
            return Err(Error::new(Kind::Io, "fails on purpose"));
        }
        self.inner.read_at(offset, bytes)
    }
}

/// Far more steps than wait for the threads: whoever plans must not wait for ever.
#[tokio::test]
async fn a_failing_read_of_a_file_ends_the_copy_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    std::fs::write(&from, vec![1; 64 << 20]).unwrap();
    for budget in [4096, 16 << 20] {
        let inner = FileSource::open(&from, Access::Once).unwrap();
        let door = Failing { inner: inner.blocking().unwrap(), from: 1 << 20 };
        let source = Arc::new(Behind { inner, door: Arc::new(door) });
        let new = NewFile::create(&to, 64 << 20, Existing::Refuse).unwrap();
        let options =
            Options { request_bytes: Some(65536), budget: Budget::new(budget), ..options() };
        let error = run(source, new.sink(), &options).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Io, "{error:?}");
        assert!(error.to_string().contains("of the source"), "{error}");
    }
}

/// Reads hang until the sender is dropped.
struct Hanging(Mutex<mpsc::Receiver<()>>);

impl BlockingRead for Hanging {
    fn read_at(&self, _offset: u64, bytes: &mut [u8]) -> Result<Waited> {
        let _ = self.0.lock().unwrap().recv();
        bytes.fill(1);
        Ok(Waited::ForDisk)
    }
}

/// A new file whose writes go through another door.
struct Before {
    inner: Arc<dyn BlockSink>,
    door: Arc<dyn BlockingWrite>,
}

#[async_trait]
impl BlockSink for Before {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn starts_zero(&self) -> bool {
        true
    }

    async fn write(&self, _offset: u64, _buffer: Buffer) -> Result<()> {
        unreachable!("files are copied by threads")
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.inner.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.inner.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    fn blocking_sink(&self) -> Option<Arc<dyn BlockingWrite>> {
        Some(Arc::clone(&self.door))
    }
}

/// Writes hang until the sender is dropped.
struct HangingWrites {
    answer: Mutex<mpsc::Receiver<()>>,
    inner: Arc<dyn BlockingWrite>,
}

impl BlockingWrite for HangingWrites {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let _ = self.answer.lock().unwrap().recv();
        self.inner.write_at(offset, bytes)
    }

    fn zero_at(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.inner.zero_at(range, mode)
    }
}

/// Copies 1 MiB, stops that once it hangs, and requires that it ends in time and says so.
async fn is_stopped(
    source: Arc<dyn BlockSource>,
    sink: Arc<dyn BlockSink>,
    hangs: impl Fn() -> bool,
) {
    let control = Control::new();
    let progress = control.add_disk("vda", 1 << 20);
    let options = options();
    let mut copied = std::pin::pin!(copy(source, sink, &options, &control, &progress));
    let mut stopped: Option<tokio::time::Instant> = None;
    let error = loop {
        tokio::select! {
            biased;
            copied = &mut copied => break copied.unwrap_err(),
            () = tokio::task::yield_now() => tokio::time::advance(Duration::from_secs(1)).await,
        }
        if stopped.is_none() && hangs() {
            stopped = Some(tokio::time::Instant::now());
            control.cancel();
        }
    };
    let waited = stopped.expect("it hung").elapsed();
    assert!(waited < ANSWER * 2, "{waited:?}");
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(error.to_string().contains("the source or the sink does not answer"), "{error}");
}

/// What a file of 1 MiB holds.
fn content(of: &NewFile) -> Vec<u8> {
    let mut content = vec![1; 1 << 20];
    std::fs::File::from(of.descriptor().unwrap()).read_exact_at(&mut content, 0).unwrap();
    content
}

/// A stop once waited for the threads that read, and they for a file system that hung.
#[tokio::test(start_paused = true)]
async fn a_stop_ends_a_copy_whose_file_system_hangs_and_nothing_is_written_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    std::fs::write(&from, vec![1; 1 << 20]).unwrap();
    let (answer, hung) = mpsc::channel();
    let hanging = Arc::new(Hanging(Mutex::new(hung)));
    let inner = FileSource::open(&from, Access::Once).unwrap();
    let source = Arc::new(Behind { inner, door: Arc::clone(&hanging) as _ });
    let new = NewFile::create(&to, 1 << 20, Existing::Refuse).unwrap();
    is_stopped(source, new.sink(), || hanging.0.try_lock().is_err()).await;
    drop(answer);
    // The threads end, and let go of what they shared.
    while Arc::strong_count(&hanging) > 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(content(&new).iter().all(|byte| *byte == 0), "it was written");
}

/// A thread once wrote the rest of its step when the write that hung had returned.
#[tokio::test(start_paused = true)]
async fn the_write_that_hung_is_the_last_that_a_thread_does_after_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    // Each block of data is a write of its own.
    let data = [[1; 4096], [0; 4096]].concat().repeat(128);
    std::fs::write(&from, data).unwrap();
    let (answer, hung) = mpsc::channel();
    let new = NewFile::create(&to, 1 << 20, Existing::Refuse).unwrap();
    let inner = new.sink();
    let door = inner.blocking_sink().unwrap();
    let hanging = Arc::new(HangingWrites { answer: Mutex::new(hung), inner: door });
    let sink = Arc::new(Before { inner, door: Arc::clone(&hanging) as _ });
    let source = Arc::new(FileSource::open(&from, Access::Once).unwrap());
    is_stopped(source, sink, || hanging.answer.try_lock().is_err()).await;
    drop(answer);
    while Arc::strong_count(&hanging) > 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let written = content(&new).chunks(4096).filter(|block| block[0] == 1).count();
    assert!((1..=THREADS_DISK).contains(&written), "{written} of 128");
}
