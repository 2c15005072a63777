//! The commands the documents show exist, with the options they are shown with.
//!
//! Every `vmbackup …` line of a fenced block in README.md and docs/ is parsed by the program itself
//! with `--help` appended: the parser goes through all arguments before it prints the help.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn every_command_shown_is_one_the_program_understands() {
    let mut shown = 0;
    let mut broken = Vec::new();
    for file in documents() {
        let text = fs::read_to_string(&file).expect("own tree");
        for (number, arguments) in commands(&text) {
            shown += 1;
            let mut command = Command::new(env!("CARGO_BIN_EXE_vmbackup"));
            let output = command.args(&arguments).arg("--help").output().expect("it runs");
            if !output.status.success() {
                let message = String::from_utf8_lossy(&output.stderr);
                let first = message.lines().next().unwrap_or_default();
                broken.push(format!("{}:{number}: {arguments:?}: {first}", file.display()));
            }
        }
    }
    assert!(broken.is_empty(), "commands that do not parse:\n{}", broken.join("\n"));
    assert!(shown > 0, "no command was found: has the layout of the documents changed?");
}

#[test]
fn the_readme_starts_with_the_two_commands_that_need_no_set_up() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    for command in ["./examples/quickstart.sh", "./tests/run.sh"] {
        assert!(readme.contains(command), "README.md does not name {command}");
        let file = root().join(command);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(&file).expect("it exists").permissions(),
        );
        assert!(mode & 0o111 != 0, "{command} is not executable");
    }
}

#[test]
fn commands_are_found_in_every_way_they_are_written() {
    let text = "vmbackup prose is not a command\n```\n$ vmbackup list --domain 'a b' | head\n\
                # sudo vmbackup gc  # frees space\nVMBACKUP_REPO=/r vmbackup \\\n  check\noutput\n```\n";
    let found = commands(text);
    let expected = [vec!["list", "--domain", "a b"], vec!["gc"], vec!["check"]]
        .map(|words| words.into_iter().map(str::to_owned).collect::<Vec<_>>());
    assert_eq!(found.into_iter().map(|(_, arguments)| arguments).collect::<Vec<_>>(), expected);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and the documents in docs/.
fn documents() -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("docs")).expect("docs/");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("own tree").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.push(root().join("README.md"));
    files.sort();
    files
}

/// The arguments of every `vmbackup` command in fenced blocks, with its line number.
fn commands(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut fenced = false;
    let mut open = String::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if !fenced {
            continue;
        }
        if let Some(start) = line.strip_suffix('\\') {
            open.push_str(start);
            continue;
        }
        open.push_str(line);
        if let Some(arguments) = arguments(&std::mem::take(&mut open)) {
            found.push((number + 1, arguments));
        }
    }
    found
}

/// The arguments, if the line is a `vmbackup` command: after a prompt, `sudo` and variables, up to
/// what belongs to the shell.
fn arguments(line: &str) -> Option<Vec<String>> {
    let mut words = words(line).into_iter().skip_while(|word| {
        ["$", "#", "sudo"].contains(&word.as_str())
            || word
                .split_once('=')
                .is_some_and(|(name, _)| name.starts_with(|c: char| c.is_ascii_uppercase()))
    });
    let program = words.next()?;
    if Path::new(&program).file_name()? != "vmbackup" {
        return None;
    }
    let shell = |word: &str| ["|", ">", ">>", "2>", "&", "&&", ";", "#"].contains(&word);
    Some(words.take_while(|word| !shell(word)).collect())
}

/// Splits as a shell does, as far as documents need it: blanks and quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}
