//! The endpoints and options of `vmbackup copy`: a word a line.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let line: Vec<String> = text.split('\n').map(str::to_owned).collect();
    vmbackup::cli::fuzzing::copy(&line);
});
