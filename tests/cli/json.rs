//! What `--json` prints is what `docs/json.md` says: every field of every document is in its section, or among
//! what all documents share.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::fixture::Fixture;
use crate::support::{NbdServer, TestEnv};

/// The names in backquotes of a text.
fn names(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The fields of a value and of all in it.
fn fields(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, inner) in object {
                found.insert(name.clone());
                fields(inner, found);
            }
        }
        Value::Array(list) => list.iter().for_each(|inner| fields(inner, found)),
        _ => {}
    }
}

/// `docs/json.md`, with the documents that were compared with it.
struct Documented {
    text: String,
    seen: BTreeSet<String>,
}

impl Documented {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.md");
        Self { text: std::fs::read_to_string(path).unwrap(), seen: BTreeSet::new() }
    }

    /// Parts of the text by their headings; the first is what all documents share.
    fn sections(&self) -> (&str, Vec<(&str, &str)>) {
        let (shared, documents) = self.text.split_at(self.text.find("\n## `backup`").unwrap());
        let sections = documents.split("\n## ").skip(1);
        (shared, sections.map(|section| section.split_once('\n').unwrap()).collect())
    }

    #[track_caller]
    fn has(&mut self, document: &Value) {
        let name = document["document"].as_str().expect("a document says which it is").to_owned();
        let (shared, sections) = self.sections();
        let of_it = |(heading, _): &&(&str, &str)| names(heading).contains(&name);
        let section = sections.iter().find(of_it);
        let (_, section) = section.unwrap_or_else(|| panic!("no section of '{name}'"));
        // Fields of shared objects are written as JSON there.
        let mut known = names(shared);
        known.extend(["mode", "base", "reason"].map(str::to_owned));
        known.extend(names(section));
        let mut found = BTreeSet::new();
        fields(document, &mut found);
        let unknown: Vec<_> = found.difference(&known).collect();
        assert!(unknown.is_empty(), "{unknown:?} of '{name}' are not documented: {document}");
        self.seen.insert(name);
    }
}

#[test]
fn every_field_of_every_document_is_in_its_documentation() {
    let fixture = Fixture::new();
    let env: &TestEnv = &fixture.env;
    let mut documented = Documented::read();
    let point = fixture.point();
    fixture.write(1 << 20, b"more", 100_000);
    documented.has(&fixture.back_up(&["backup", "--verify-source", "--json"]).json());
    documented.has(&fixture.back_up(&["plan", "--json"]).json());
    let image = format!("{},format=raw", fixture.image.display());
    let server = NbdServer::qemu_nbd(env, &fixture.image, &["-f", "raw"]);
    let uri = server.uri("");
    let key = env.path("key");
    std::fs::write(&key, "0123456789abcdef0123456789abcdef\n").unwrap();
    let (key, other) = (key.to_string_lossy(), env.path("other").to_string_lossy().into_owned());
    let commands: &[&[&str]] = &[
        &["list"],
        &["show", &point],
        &["restore", &point, "--to", "planned", "--dry-run"],
        &["restore", &point, "--to", "restored", "--salvage"],
        &["verify", "foo@latest", "--against", &image],
        &["hash", &image],
        &["copy", &image, "copied.raw", "--verify"],
        &["nbd", "info", "--content", &uri],
        &["nbd", "list", &uri],
        &["nbd", "map", &uri],
        &["nbd", "map", "--totals", &uri],
        &["nbd", "read", &uri],
        &["nbd", "bench", "--time", "1", &uri],
        &["check", "--read-data"],
        &["forget", &point],
        &["gc"],
        &["recover"],
        &["repo", "info"],
        &["repo", "init", "--repo", &other, "--key-file", &key],
    ];
    for command in commands {
        documented.has(&env.vmbackup(&[command, &["--json"][..]].concat()).json());
    }
    assert_eq!(documented.seen.len(), commands.len() + 1, "{:?}", documented.seen);
}
