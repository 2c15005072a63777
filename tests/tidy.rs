//! The rules of the tree that the compiler does not know: layers, sizes, head documentation.
//!
//! Function length and parameter counts are clippy's (`clippy.toml`). A rule that is broken names
//! the file and the line; there is no list of exceptions.

use std::fs;
use std::path::{Path, PathBuf};

/// A longer file is a design fault.
const FILE_LINES_MAX: usize = 800;

/// Layer of each top-level module, times ten; imports go to a lower one only. Within L1, `image`
/// stands on `nbd`.
const LAYERS: [(&str, u8); 21] = [
    ("block", 0),
    ("clock", 0),
    ("content", 0),
    ("control", 0),
    ("dice", 0),
    ("error", 0),
    ("units", 0),
    ("vm", 0),
    ("workers", 0),
    ("freeze", 10),
    ("journal", 10),
    ("nbd", 10),
    ("image", 15),
    ("copy", 20),
    ("platform", 20),
    ("policy", 20),
    ("repo", 20),
    ("job", 30),
    ("daemon", 40),
    ("api", 50),
    ("cli", 60),
];

/// What a face (L4 and up) must not reach past the jobs.
const BEHIND_JOBS: [&str; 3] = ["copy", "platform", "repo"];

#[test]
fn imports_go_downward_only() {
    let mut broken = Vec::new();
    for file in rust_files(&["src"]) {
        let relative = file.strip_prefix(root().join("src")).expect("below src").to_owned();
        let module = first_component(&relative);
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let Some(layer) = layer_of(&module) else {
            broken.push(format!("{}: module {module} has no layer in tidy.rs", relative.display()));
            continue;
        };
        for (line, used) in crate_uses(&code_of(&file)) {
            let Some(used_layer) = layer_of(&used) else { continue };
            let sideways = used_layer == layer && layer != 0;
            let past_jobs = layer >= 40 && BEHIND_JOBS.contains(&used.as_str());
            if used != module && (used_layer > layer || sideways || past_jobs) {
                broken.push(format!("{}:{line}: {module} uses {used}", relative.display()));
            }
        }
    }
    assert!(broken.is_empty(), "imports against the layers:\n{}", broken.join("\n"));
}

#[test]
fn no_platform_imports_another() {
    let platforms = root().join("src/platform");
    let names: Vec<String> = fs::read_dir(&platforms)
        .expect("src/platform")
        .filter_map(|entry| {
            let path = entry.expect("readable").path();
            path.is_dir().then(|| file_stem(&path))
        })
        .collect();
    let mut broken = Vec::new();
    for name in &names {
        for file in rust_files(&[&format!("src/platform/{name}")]) {
            for (number, line) in code_of(&file).lines().enumerate() {
                let other = names.iter().filter(|other| *other != name).find(|other| {
                    line.contains(&format!("platform::{other}::"))
                        || line.contains(&format!("super::super::{other}::"))
                });
                if let Some(other) = other {
                    broken.push(format!("{}:{}: uses {other}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(broken.is_empty(), "platforms that import another:\n{}", broken.join("\n"));
}

#[test]
fn no_file_is_longer_than_a_reader_holds_in_mind() {
    let long: Vec<String> = rust_files(&["src", "qmp", "tests", "benches", "examples"])
        .iter()
        .filter_map(|file| {
            let lines = read(file).lines().count();
            (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines", file.display()))
        })
        .collect();
    assert!(long.is_empty(), "files over {FILE_LINES_MAX} lines:\n{}", long.join("\n"));
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let silent: Vec<String> = rust_files(&["src", "qmp", "tests", "benches", "examples"])
        .iter()
        .filter(|file| !read(file).trim_start().starts_with("//!"))
        .map(|file| file.display().to_string())
        .collect();
    assert!(silent.is_empty(), "files without a `//!` head:\n{}", silent.join("\n"));
}

#[test]
fn no_file_knows_the_machine_it_was_written_on() {
    let own_path = root().display().to_string();
    let home = concat!("/ho", "me/");
    let mut broken = Vec::new();
    for file in all_files(&["src", "qmp", "tests", "examples", "docs", "benches", "README.md"]) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for (number, line) in text.lines().enumerate() {
            if line.contains(&own_path) || line.contains(home) {
                broken.push(format!("{}:{}: {line}", file.display(), number + 1));
            }
        }
    }
    assert!(broken.is_empty(), "paths of one machine:\n{}", broken.join("\n"));
}

#[test]
fn every_relative_link_in_the_documents_leads_somewhere() {
    let mut broken = Vec::new();
    for file in all_files(&["README.md", "docs"]) {
        if file.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let folder = file.parent().expect("a file has a folder").to_owned();
        for target in read(&file).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            let external = target.contains("://") || path.is_empty();
            if !external && !folder.join(path).exists() {
                broken.push(format!("{}: {target}", file.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn every_test_a_document_names_is_there() {
    let code: String = rust_files(&["src", "qmp", "tests"]).iter().map(|file| read(file)).collect();
    let mut missing = Vec::new();
    for file in all_files(&["README.md", "docs"]) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let quoted = text.split('`').skip(1).step_by(2);
        // A test's name is a claim: a sentence of several words.
        let names = quoted.filter(|name| {
            name.matches('_').count() > 2
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        });
        let gone = names.filter(|name| !code.contains(&format!("fn {name}(")));
        missing.extend(gone.map(|name| format!("{}: {name}", file.display())));
    }
    assert!(
        missing.is_empty(),
        "tests that documents name and nobody wrote:\n{}",
        missing.join("\n")
    );
}

#[test]
fn the_import_scan_sees_every_way_to_write_one() {
    let code = "use crate::repo::Writer;\nuse crate::{\n    block::Buf,\n    nbd::{a, b},\n};\n\
                fn f() { crate::job::run(); }\npub(in crate::cli) fn g() {}\n";
    let found: Vec<String> = crate_uses(code).into_iter().map(|(_, name)| name).collect();
    assert_eq!(found, ["repo", "block", "nbd", "job", "cli"]);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn file_stem(path: &Path) -> String {
    path.file_stem().expect("a name").to_string_lossy().into_owned()
}

/// The top-level module a file below `src` belongs to.
fn first_component(relative: &Path) -> String {
    file_stem(Path::new(relative.components().next().expect("not empty").as_os_str()))
}

fn layer_of(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

/// A file without its whole-line comments, with the line count kept.
fn code_of(path: &Path) -> String {
    let keep = |line: &str| !line.trim_start().starts_with("//");
    read(path).lines().map(|line| if keep(line) { line } else { "" }).fold(
        String::new(),
        |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        },
    )
}

/// The modules named after `crate::`, with their lines, also in `crate::{a, b::c}`.
fn crate_uses(code: &str) -> Vec<(usize, String)> {
    let mut uses = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate::` of macros and `other_crate::` are something else.
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            uses.extend(group_heads(group).into_iter().map(|head| (line, head)));
        } else {
            uses.push((line, identifier(rest)));
        }
    }
    uses
}

/// The first identifier of each element of a `{…}` group, whose opening brace is consumed.
fn group_heads(group: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let (mut depth, mut fresh) = (0_u32, true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => fresh = true,
            c if fresh && (c.is_alphabetic() || c == '_') => {
                heads.push(identifier(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
    }
    heads
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn rust_files(folders: &[&str]) -> Vec<PathBuf> {
    let mut files = all_files(folders);
    files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    files
}

/// All files below the named folders (or the named files), sorted; what is not there is skipped.
fn all_files(names: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = names.iter().map(|name| root().join(name)).collect();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name == "target") {
                continue;
            }
            let entries = fs::read_dir(&path).expect("own tree");
            open.extend(entries.map(|entry| entry.expect("own tree").path()));
        } else if path.exists() {
            found.push(path);
        }
    }
    found.sort();
    found
}
