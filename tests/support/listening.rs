//! Whether anybody listens on a socket; also for test binaries that use nothing else of `support`.

use std::path::Path;

/// Whether a process listens on this socket, which it was given by this very path: its file is there a
/// moment earlier (proc(5), flags `__SO_ACCEPTCON`).
pub(crate) fn is_listening(socket: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/net/unix").expect("proc is mounted");
    let path = socket.to_str().expect("a path of ours");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some("00010000") && fields.nth(3) == Some(path)
    })
}
