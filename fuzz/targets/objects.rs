//! What a repository stores, as it is read once its seal is open: it is refused, or says the same
//! again.
#![no_main]

use vmbackup::repo::pack::{decode_trailer, encode_trailer};
use vmbackup::repo::tree::Node;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some(node) = Node::decode(bytes) {
        let again = Node::decode(&node.encode()).expect("it was said by us");
        assert_eq!(again.hash(), node.hash());
    }
    if let Some(blobs) = decode_trailer(bytes) {
        assert_eq!(decode_trailer(&encode_trailer(&blobs)).expect("it was said by us"), blobs);
    }
});
