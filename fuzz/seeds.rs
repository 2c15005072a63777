//! Writes the inputs that the bounded runs keep (`tests/*/corpus`) to `fuzz/corpus/TARGET`, in the
//! form the targets read. Run in any directory; what the fuzzer found is left alone, and
//! inputs of an earlier run are written anew.

use std::fs;
use std::path::{Path, PathBuf};

mod parts;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // In the order of `Session::ALL` (tests/nbd/said.rs), which the first byte chooses from.
    for (session, name) in (0_u8..).zip(["read", "look", "write", "secure"]) {
        for (kept, said) in transcripts(&root.join("../tests/nbd/corpus").join(name)) {
            let input = [&[session][..], &parts::encode(&said)].concat();
            fs::write(directory(root, "client").join(format!("{name}-{kept}")), input).unwrap();
        }
    }
    for (kept, said) in transcripts(&root.join("../tests/nbd_server/corpus")) {
        fs::write(directory(root, "server").join(kept), said.concat()).unwrap();
    }
    let lines = fs::read_to_string(root.join("../tests/nbd/corpus/uris.txt")).unwrap();
    let to = directory(root, "uri");
    for (number, line) in lines.lines().enumerate() {
        let text: String = serde_json::from_str(line).unwrap();
        fs::write(to.join(format!("kept-{number}")), text).unwrap();
    }
    let lines = fs::read_to_string(root.join("../tests/cli/corpus/copy.txt")).unwrap();
    let to = directory(root, "copy");
    for (number, line) in lines.lines().enumerate() {
        let words: Vec<String> = serde_json::from_str(line).unwrap();
        fs::write(to.join(format!("kept-{number}")), words.join("\n")).unwrap();
    }
    for target in ["options", "monitor", "objects"] {
        directory(root, target);
    }
}

/// What is kept in a folder, by name: the parts of what a peer says.
fn transcripts(folder: &Path) -> Vec<(String, Vec<Vec<u8>>)> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, text.lines().map(bytes).collect())
        })
        .collect()
}

fn directory(root: &Path, target: &str) -> PathBuf {
    let path = root.join("corpus").join(target);
    fs::create_dir_all(&path).unwrap();
    path
}

/// A line of hexadecimal digits.
fn bytes(line: &str) -> Vec<u8> {
    let digits = line.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}
