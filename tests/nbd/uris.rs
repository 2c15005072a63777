//! Any text as a URI: shared by the bounded run of `fuzz.rs` and by the coverage-guided one in `fuzz/`.

use vmbackup::nbd::{NbdUri, Origin};

/// The text is refused, or is a URI that its own text names again.
pub fn survives(text: &str) {
    if let Ok(uri) = NbdUri::parse(text, Origin::CommandLine) {
        let again = NbdUri::parse(&uri.to_string(), Origin::CommandLine);
        assert_eq!(again.expect("it was said by us"), uri);
    }
}
