//! Writes the inputs that the bounded runs keep (`tests/*/corpus`) to `fuzz/corpus/TARGET`, in the
//! form the targets read. Run in any directory; what the fuzzer found is left alone, and
//! inputs of an earlier run are written anew.

use std::fs;
use std::path::{Path, PathBuf};

mod parts;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (subject, target) in [("nbd", "client"), ("nbd_server", "server")] {
        let to = directory(root, target);
        for file in fs::read_dir(root.join("../tests").join(subject).join("corpus")).unwrap() {
            let path = file.unwrap().path();
            let text = fs::read_to_string(&path).unwrap();
            let said: Vec<Vec<u8>> = text.lines().map(bytes).collect();
            let input = if target == "client" { parts::encode(&said) } else { said.concat() };
            fs::write(to.join(path.file_stem().unwrap()), input).unwrap();
        }
    }
    let lines = fs::read_to_string(root.join("../tests/cli/corpus/copy.txt")).unwrap();
    let to = directory(root, "copy");
    for (number, line) in lines.lines().enumerate() {
        let words: Vec<String> = serde_json::from_str(line).unwrap();
        fs::write(to.join(format!("kept-{number}")), words.join("\n")).unwrap();
    }
    for target in ["options", "uri", "monitor", "objects"] {
        directory(root, target);
    }
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
