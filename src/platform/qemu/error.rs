//! Errors of the monitor and the agent as the crate's border error.

use crate::error::{Error, Kind};

/// What a failed exchange with QEMU means: `what` failed, because of the monitor's answer.
pub(super) fn failed(what: impl Into<String>) -> impl FnOnce(qmp::Error) -> Error {
    let what = what.into();
    move |error| {
        if let qmp::Error::Connect { source, .. } = &error {
            let kind = match Error::io("", std::io::Error::from(source.kind())).kind() {
                kind @ (Kind::Permission | Kind::Timeout) => kind,
                // No socket is there: nobody listens.
                _ => Kind::Connection,
            };
            let hint = "check that the VM runs and that its socket may be used by this user";
            return Error::new(kind, what).hint(hint).source(error);
        }
        let wrapped = Error::new(kind_of(&error), what);
        let wrapped = match error.kind() {
            qmp::Kind::Occupied => wrapped.hint(
                "close the other client, or start QEMU with a second socket for backups \
                 (-qmp unix:PATH,server=on,wait=off)",
            ),
            _ => wrapped,
        };
        wrapped.source(error)
    }
}

fn kind_of(error: &qmp::Error) -> Kind {
    match error.kind() {
        qmp::Kind::Connection => Kind::Connection,
        qmp::Kind::Occupied => Kind::Busy,
        qmp::Kind::NotFound => Kind::NotFound,
        qmp::Kind::Timeout => Kind::Timeout,
        qmp::Kind::Refused => kind_of_refusal(error.refusal().unwrap_or_default()),
        qmp::Kind::Unsupported => Kind::Unsupported,
        _ => Kind::Protocol,
    }
}

/// QEMU has one error class for nearly everything; its texts end in strerror(3) where an operating
/// system error is the cause, and name jobs by "busy" and "in use" (blockdev.c, bdrv_op_blocked).
fn kind_of_refusal(text: &str) -> Kind {
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if has(&["busy", "in use", "already running", "currently used"]) {
        Kind::Busy
    } else if has(&["No space left"]) {
        Kind::NoSpace
    } else if has(&["Permission denied", "Operation not permitted"]) {
        Kind::Permission
    } else {
        Kind::Unsupported
    }
}
