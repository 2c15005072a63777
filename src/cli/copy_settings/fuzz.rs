//! Command lines of `vmbackup copy` that nobody would write: each means something or is refused with
//! a message, at once, and what was understood can be said back.
//!
//! `tests/cli/corpus/copy.txt` has an input (a JSON list of arguments) for each way to end that was
//! seen; they run before anything random. `VMBACKUP_KEEP_CORPUS=1` adds lines for ends that have
//! none yet.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;

use proptest::prelude::*;

use super::entry::ended;
use super::{End, command, end};
use crate::job::source::DiskSpec;

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cli/corpus/copy.txt")
}

fn kept() -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(corpus()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The command line ends; the way it ends is one the corpus should have.
fn ends(line: &[String]) {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let end = ended(line);
    if std::env::var_os("VMBACKUP_KEEP_CORPUS").is_none() {
        return;
    }
    let mut seen = SEEN.lock().unwrap();
    if seen.is_empty() {
        seen.extend(kept().iter().map(|line| ended(line)));
    }
    if seen.insert(end) {
        let mut text = std::fs::read_to_string(corpus()).unwrap();
        writeln!(text, "{}", serde_json::to_string(line).unwrap()).unwrap();
        std::fs::write(corpus(), text).unwrap();
    }
}

#[test]
fn command_lines_of_the_corpus_end_in_as_many_ways_as_there_are_lines() {
    let lines = kept();
    assert!(lines.len() > 20, "the corpus is there");
    let ends: BTreeSet<_> = lines.iter().map(|line| ended(line)).collect();
    assert_eq!(ends.len(), lines.len(), "{ends:#?}");
}

fn endpoint() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("-".to_owned()),
        Just("null:".to_owned()),
        "point:[a-z@/]{0,12}",
        r#"\[[ a-z'"\\=\]]{0,20}\]?"#,
        "(raw|qcow2|vmdk|vpc|nbd)?:?[a-z/.]{0,12}(,format=[a-z0-9]{0,5}|,,|,[a-z=]{0,6})?",
        "(nbds?(\\+unix|\\+vsock)?|NBD|https?|file)://[!-~]{0,20}([?&](tls-(certificates|psk-file|username|hostname|verify-peer|x)|socket)=[!-~]{0,10}){0,2}",
        "[ -~é€]{0,24}",
    ]
}

fn option() -> impl Strategy<Value = Vec<String>> {
    const FLAGS: [&str; 10] = [
        "--force",
        "--in-place",
        "--compressed",
        "--verify",
        "--flush",
        "--no-flush",
        "--allocated",
        "--destination-is-zero",
        "--synchronous",
        "--target-is-zero",
    ];
    const VALUES: [&str; 9] = [
        "--target-size",
        "--sparse",
        "--connections",
        "--requests",
        "--request-size",
        "--queue-size",
        "--rate-limit",
        "--retries",
        "--retry-delay",
    ];
    let value =
        prop_oneof!["[0-9]{1,20}[kKMGTPEi]{0,2}", "[0-9]{1,3}", Just("1M".into()), "[ -~é]{0,6}"];
    prop_oneof![
        prop::sample::select(&FLAGS[..]).prop_map(|flag| vec![flag.to_owned()]),
        (prop::sample::select(&VALUES[..]), value)
            .prop_map(|(option, value)| vec![format!("{option}={value}")]),
    ]
}

/// A word as it is written between brackets.
fn quoted(word: &str, style: u8) -> String {
    let escaped = |special: &[char]| -> String {
        let escape = |c: char| if special.contains(&c) { vec!['\\', c] } else { vec![c] };
        word.chars().flat_map(escape).collect()
    };
    match style {
        0 if !word.contains('\'') => format!("'{word}'"),
        1 => format!("\"{}\"", escaped(&['"', '\\'])),
        _ if word.is_empty() => "''".to_owned(),
        _ => word.chars().flat_map(|c| ['\\', c]).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_command_line_means_something_or_is_refused(
        from in endpoint(),
        to in endpoint(),
        options in prop::collection::vec(option(), 0..4),
    ) {
        let mut line: Vec<String> = options.concat();
        line.extend(["--".to_owned(), from, to]);
        ends(&line);
    }

    #[test]
    fn words_survive_their_quotes(
        words in prop::collection::vec((".{0,12}", 0..3_u8), 1..6),
        gap in "[ \t]{1,3}",
    ) {
        let line: Vec<_> = words.iter().map(|(word, style)| quoted(word, *style)).collect();
        let text = format!("[{gap}{}{gap}]", line.join(&gap));
        let found = command(&text[1..], &text).unwrap();
        prop_assert_eq!(found, words.into_iter().map(|(word, _)| word).collect::<Vec<_>>());
    }

    #[test]
    fn a_uri_is_never_taken_for_a_file(scheme in "(?i)(nbds?(\\+unix|\\+vsock)?|https?|ssh|rbd)", rest in ".{0,20}") {
        let found = end(&format!("{scheme}://{rest}"));
        let file = matches!(found, Ok(End::Disk(DiskSpec::Image(_))));
        prop_assert!(!file, "{scheme}://{rest}");
    }
}
