//! URIs that nobody would write: each means something or is refused, and what was understood can be
//! said back.
//!
//! `uris.txt` has a text (as JSON, one a line) for each way to end that was seen; they run before
//! anything random. `VMBACKUP_KEEP_CORPUS=1` adds lines for ends that have none yet.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use proptest::prelude::*;

use crate::uris::ended;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nbd/corpus/uris.txt")
}

fn kept() -> Vec<String> {
    let text = fs::read_to_string(corpus()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The text ends; the way it ends is one the corpus should have.
fn ends(text: &str) {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let end = ended(text);
    if std::env::var_os("VMBACKUP_KEEP_CORPUS").is_none() {
        return;
    }
    let mut seen = SEEN.lock().unwrap();
    let mut lines = kept();
    if seen.is_empty() {
        seen.extend(lines.iter().map(|line| ended(line)));
    }
    if seen.insert(end) {
        lines.push(text.to_owned());
        let line = |text: &String| serde_json::to_string(text).unwrap() + "\n";
        fs::write(corpus(), lines.iter().map(line).collect::<String>()).unwrap();
    }
}

#[test]
#[allow(clippy::print_stderr, reason = "names the input that fails")]
fn texts_of_the_corpus_mean_something_or_are_refused() {
    let lines = kept();
    let ends: BTreeSet<_> = lines
        .iter()
        .map(|line| {
            eprintln!("{line:?}");
            ended(line)
        })
        .collect();
    assert!(ends.len() > 50, "the corpus is there: {ends:#?}");
}

/// A parameter with values that may be right for it.
fn parameter() -> impl Strategy<Value = String> {
    prop_oneof![
        "(socket|tls-(certificates|psk-file|username|hostname))=[!-~]{0,10}",
        "socket=(%00)?/[a-z]{0,5}",
        "tls=(on|off|require|[a-z]{0,4})",
        "tls-type=(x509|psk|anon|[a-z]{0,4})",
        "tls-verify-peer=(true|false|0|1|yes|no|on|off|[a-z]{0,4})",
        "[a-z-]{0,8}(=.{0,6})?",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_panic(text in "(nbds?(\\+unix|\\+vsock)?://)?.{0,30}([?&](tls-[a-z]+|socket)=.{0,10})*") {
        ends(&text);
    }

    #[test]
    fn any_uri_means_something_or_is_refused(
        scheme in "(nbds?(\\+unix|\\+vsock|\\+ssh)?|NBD|nbds|http)",
        host in "([a-z]{1,3}@)?([a-z.]{0,8}|[0-9]{1,3}|\\[[0-9a-f:]{2,9}\\]|[!-~]{0,6})(:[0-9]{0,6})?",
        path in "(/{0,2}[a-z%/]{0,6}|/.{0,8})?(#.{0,3})?",
        parameters in prop::collection::vec(parameter(), 0..4),
    ) {
        let query = if parameters.is_empty() { String::new() } else { format!("?{}", parameters.join("&")) };
        ends(&format!("{scheme}://{host}{path}{query}"));
    }
}
