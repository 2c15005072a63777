//! Processes with an end, waits with a deadline, servers on private sockets, image comparison.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::env::TestEnv;
use super::listening::is_listening;
use super::outcome::Outcome;

/// A running program, killed (only it) when dropped.
pub(crate) struct Process {
    child: Option<Child>,
    command: String,
    /// What it said on standard error, as far as [`Self::wait_until_said`] has read it.
    said: Vec<u8>,
}

impl Process {
    /// Starts it with its output captured. Programs that print more than a pipe holds before
    /// [`Self::wait`] is called would stall: none of ours does.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let line = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|error| panic!("{line}: {error}"));
        Self { child: Some(child), command: line, said: Vec::new() }
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().expect("present until waited for").id()
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        let child = self.child.as_mut().expect("present until waited for");
        child.try_wait().expect("own child").is_none()
    }

    /// Waits until it has stopped itself at a step: longer than libvirt lets events of a guest's agent, each of
    /// which waits half a minute for a job that was left, hold up the end of that.
    #[track_caller]
    pub(crate) fn wait_until_stopped(&self, step: &str) {
        let stat = format!("/proc/{}/stat", self.id());
        wait_until(&format!("the step {step}"), 150, || {
            let text = fs::read_to_string(&stat).expect("a child is there until waited for");
            let state = text.rsplit_once(") ").expect("a state").1.chars().next();
            assert!(state != Some('Z'), "it ended before {step}");
            state == Some('T')
        });
    }

    /// Sends a signal, by the name `kill` knows.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.id().to_string()]).status();
        assert!(status.expect("kill runs").success(), "cannot signal {}", self.command);
    }

    /// Waits until it has said `words` in one line on standard error; fails the test after `seconds`,
    /// and when it ends without.
    #[track_caller]
    pub(crate) fn wait_until_said(&mut self, words: &str, seconds: u64) {
        let child = self.child.as_mut().expect("present until waited for");
        let mut stderr = child.stderr.take().expect("captured");
        let (sender, receiver) = std::sync::mpsc::channel();
        let wanted = words.to_owned();
        // Byte by byte: what comes after the line is for whoever reads next.
        std::thread::spawn(move || {
            let (mut said, mut byte, mut line) = (Vec::new(), [0], 0);
            while stderr.read(&mut byte).is_ok_and(|count| count == 1) {
                said.push(byte[0]);
                if byte == *b"\n" {
                    if String::from_utf8_lossy(&said[line..]).contains(&wanted) {
                        let _ = sender.send((true, said, stderr));
                        return;
                    }
                    line = said.len();
                }
            }
            let _ = sender.send((false, said, stderr));
        });
        let found = receiver.recv_timeout(Duration::from_secs(seconds));
        let Ok((found, said, stderr)) = found else { panic!("no {words:?} after {seconds} s") };
        child.stderr = Some(stderr);
        self.said.extend(said);
        let said = String::from_utf8_lossy(&self.said);
        assert!(found, "{} ended without {words:?}: {said}", self.command);
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Outcome {
        let child = self.child.take().expect("present until waited for");
        let mut output = child.wait_with_output().expect("own child");
        self.said.append(&mut output.stderr);
        output.stderr = std::mem::take(&mut self.said);
        Outcome::from_output(self.command.clone(), &output)
    }

    /// Sends Ctrl-C to one that has stopped itself at a step; requires that it ends for that within `seconds`.
    #[track_caller]
    pub(crate) fn ends_by_ctrl_c(self, seconds: u64) {
        self.signal("INT");
        let since = Instant::now();
        self.signal("CONT");
        let stopped = self.wait();
        let took = since.elapsed();
        assert_eq!(stopped.code, Some(130), "{stopped:?}");
        assert!(took < Duration::from_secs(seconds), "{took:?}: {stopped:?}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            // One that waits for a disk that hangs ends when that answers: perhaps it is dropped next.
            let deadline = Instant::now() + Duration::from_secs(5);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Polls `ready` until it gives a value; fails the test after `seconds`.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, seconds: u64, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not after {seconds} s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Polls `ready` until it is true; fails the test after `seconds`.
#[track_caller]
pub(crate) fn wait_until(what: &str, seconds: u64, mut ready: impl FnMut() -> bool) {
    wait_for(what, seconds, || ready().then_some(()));
}

/// An NBD server on a private unix socket.
pub(crate) struct NbdServer {
    socket: PathBuf,
    process: Process,
}

impl NbdServer {
    /// `qemu-nbd` serving `image`, read-only; `args` come before the image.
    pub(crate) fn qemu_nbd(env: &TestEnv, image: &Path, args: &[&str]) -> Self {
        let socket = env.path(&format!("run/qemu-nbd-{}.sock", unique()));
        let mut command = env.command("qemu-nbd");
        command.args(["-r", "-t", "-e", "16", "-k"]).arg(&socket).args(args).arg(image);
        Self::start(command, socket)
    }

    /// `nbdkit` with the given plugin and options, after `-U SOCKET -f`.
    pub(crate) fn nbdkit(env: &TestEnv, args: &[&str]) -> Self {
        let socket = env.path(&format!("run/nbdkit-{}.sock", unique()));
        let mut command = env.command("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(args);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: PathBuf) -> Self {
        let mut process = Process::spawn(&mut command);
        wait_until("the NBD server's socket", 20, || {
            assert!(process.is_running(), "{command:?} ended at once");
            is_listening(&socket)
        });
        Self { socket, process }
    }

    /// Its URI for the named export (empty for the default one).
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process, to be disturbed.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Requires two images to hold the same guest-visible bytes and to have the same size, whatever
/// their formats and allocation.
#[track_caller]
pub(crate) fn assert_same_content(env: &TestEnv, a: (&Path, &str), b: (&Path, &str)) {
    let (a_path, a_format) = a;
    let (b_path, b_format) = b;
    assert_eq!(virtual_size(env, a), virtual_size(env, b), "{a:?} and {b:?} differ in size");
    // Not -s: it also compares what is allocated, which need not be equal.
    let mut command = env.command("qemu-img");
    command.args(["compare", "-U", "-f", a_format, "-F", b_format]);
    let outcome = Outcome::of(command.arg(a_path).arg(b_path));
    assert!(outcome.code == Some(0), "contents differ: {outcome:?}");
}

/// Size of the disk inside an image.
#[track_caller]
pub(crate) fn virtual_size(env: &TestEnv, (path, format): (&Path, &str)) -> u64 {
    let mut command = env.command("qemu-img");
    let info = Outcome::of(command.args(["info", "-U", "--output=json", "-f", format]).arg(path));
    info.json()["virtual-size"].as_u64().expect("qemu-img info gives the size")
}
