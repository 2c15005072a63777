//! Inputs of the fuzz tests that are kept: for each way a session was seen to end, one that ends so.
//! They are run before anything random, so what was once reached is reached in every run.
//!
//! A file has a line of hexadecimal digits for each part of what the peer says; between the parts it
//! waits for a request. `VMBACKUP_KEEP_CORPUS=1` adds files for ends that have none yet. What makes a
//! test fail is left in Cargo's directory for tests, to be kept here when the bug is gone.

use std::fmt::Write;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

/// What a peer says, in parts.
pub type Parts = Vec<Vec<u8>>;

/// The corpus of one test.
pub struct Corpus {
    dir: PathBuf,
}

impl Corpus {
    /// The one in this folder of `tests`.
    pub fn at(folder: &str) -> Self {
        Self { dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder) }
    }

    /// All inputs, with their names.
    pub fn inputs(&self) -> Vec<(String, Parts)> {
        let files = fs::read_dir(&self.dir).unwrap().map(|file| file.unwrap().path());
        let mut inputs: Vec<_> = files
            .map(|path| {
                let text = fs::read_to_string(&path).unwrap();
                (path.display().to_string(), text.lines().map(bytes).collect())
            })
            .collect();
        inputs.sort();
        inputs
    }

    /// Keeps an input that ended as none did before.
    pub fn keep(&self, end: &str, parts: &Parts) {
        if std::env::var_os("VMBACKUP_KEEP_CORPUS").is_none() {
            return;
        }
        let path = self.dir.join(format!("{}.txt", name(end)));
        if !path.exists() {
            fs::create_dir_all(&self.dir).unwrap();
            fs::write(path, text(parts)).unwrap();
        }
    }
}

/// A way to end, without the numbers and names that differ from case to case: its first and its last
/// three words.
fn name(end: &str) -> String {
    let rule = end.split_once("broke the protocol").map_or(end, |(_, rule)| rule).to_lowercase();
    let rule = rule.split('\'').next().unwrap_or_default();
    let digits = |word: &&str| word.chars().all(|c| c == 'x' || c.is_ascii_hexdigit());
    let words = rule.split(|c: char| !c.is_ascii_alphabetic());
    let words: Vec<_> = words.filter(|word| word.len() > 1 && !digits(word)).collect();
    let middle = 3.min(words.len())..3.max(words.len().saturating_sub(3));
    let kept = words.iter().enumerate().filter(|(at, _)| !middle.contains(at));
    kept.map(|(_, word)| *word).collect::<Vec<_>>().join("-")
}

/// Runs a case; one that panics is written down. The last one written is the smallest.
pub fn watched<T>(subject: &str, parts: &Parts, case: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|panic| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{subject}-failed.txt"));
        fs::write(path, text(parts)).unwrap();
        resume_unwind(panic)
    })
}

fn text(parts: &Parts) -> String {
    let mut text = String::new();
    for part in parts {
        for byte in part {
            write!(text, "{byte:02x}").unwrap();
        }
        text.push('\n');
    }
    text
}

fn bytes(line: &str) -> Vec<u8> {
    let digits = line.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}
