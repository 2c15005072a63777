//! Looking at all the exports of a server that fails for some, or that would have us keep more than
//! anybody needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use vmbackup::error::Kind;
use vmbackup::nbd::wire::{HeaderStyle, info, option, reply};
use vmbackup::nbd::{Described, Timeouts, Which, describe};

use crate::script::{SIZE, Scripted, honest, option_reply, play};

const STRUCTURED: HeaderStyle = HeaderStyle::Structured;

/// What a server says when it is asked for its exports.
pub fn listed(exports: &[(&str, &str)]) -> Vec<u8> {
    let server = |(name, description): &(&str, &str)| {
        let mut payload = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        payload.extend(name.as_bytes());
        payload.extend(description.as_bytes());
        option_reply(option::LIST, reply::SERVER, &payload)
    };
    let ack = option_reply(option::LIST, reply::ACK, &[]);
    exports.iter().map(server).chain([ack]).flatten().collect()
}

/// What it says of an export.
pub fn told() -> Vec<u8> {
    let mut payload = info::EXPORT.to_be_bytes().to_vec();
    payload.extend(SIZE.to_be_bytes());
    payload.extend([0, 1]);
    let info = option_reply(option::INFO, reply::INFO, &payload);
    [info, option_reply(option::INFO, reply::ACK, &[])].concat()
}

/// Contexts with names of `len` bytes.
pub fn contexts(count: usize, len: usize) -> Vec<u8> {
    let payload = [&[0; 4][..], &vec![b'x'; len]].concat();
    let option = option::LIST_META_CONTEXT;
    let context = option_reply(option, reply::META_CONTEXT, &payload);
    [context.repeat(count), option_reply(option, reply::ACK, &[])].concat()
}

/// A server whose answer to an option may depend on how often it was given, over all sessions.
fn server(
    say: impl Fn(u32, usize) -> Option<Vec<u8>> + Send + Sync + 'static,
) -> (Scripted, Arc<AtomicUsize>) {
    let (say, sessions) = (Arc::new(say), Arc::new(AtomicUsize::new(0)));
    let (asked, begun) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&sessions));
    let script = Scripted::new(move |stream| {
        begun.fetch_add(1, Ordering::Relaxed);
        let (say, asked) = (Arc::clone(&say), Arc::clone(&asked));
        let answer = move |option| {
            let times = match option {
                option::INFO => asked.fetch_add(1, Ordering::Relaxed),
                _ => 0,
            };
            say(option, times).unwrap_or_else(|| honest(STRUCTURED, option))
        };
        play(stream, STRUCTURED, answer, |_| Vec::new())
    });
    (script, sessions)
}

async fn look(server: &Scripted, which: Which<'_>) -> Vec<Described> {
    let handshake = Duration::from_millis(500);
    let timeouts = Timeouts { handshake, ..Timeouts::default() };
    describe(server, which, timeouts).await.unwrap().exports
}

fn error(described: &Described) -> (Kind, String) {
    let error = described.told.as_ref().map(|_| ()).unwrap_err();
    (error.kind(), error.to_string())
}

const THREE: [(&str, &str); 3] = [("a", "the first"), ("b", ""), ("c", "the third")];

/// [`THREE`], of which the second gets this answer.
fn second_gets(answer: Vec<u8>) -> (Scripted, Arc<AtomicUsize>) {
    server(move |option, times| match option {
        option::LIST => Some(listed(&THREE)),
        option::INFO if times == 1 => Some(answer.clone()),
        option::INFO => Some(told()),
        _ => None,
    })
}

#[tokio::test]
async fn an_export_that_is_refused_is_told_of_among_the_others() {
    let (server, _) = second_gets(option_reply(option::INFO, reply::UNKNOWN, b"gone"));
    let exports = look(&server, Which::All).await;
    let names: Vec<_> = exports.iter().map(|e| (&*e.listed.name, &*e.listed.description)).collect();
    assert_eq!(names, THREE);
    assert!(exports[0].told.is_ok() && exports[2].told.is_ok(), "{exports:?}");
    let (kind, text) = error(&exports[1]);
    assert_eq!(kind, Kind::NotFound);
    assert!(text.contains("'b'") && text.contains("gone"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn an_export_that_hangs_has_its_own_time_and_a_session_that_is_out_of_step_is_left() {
    let (server, sessions) = second_gets(Vec::new());
    let exports = look(&server, Which::All).await;
    assert!(exports[0].told.is_ok() && exports[2].told.is_ok(), "{exports:?}");
    assert_eq!(error(&exports[1]).0, Kind::Timeout);
    assert_eq!(sessions.load(Ordering::Relaxed), 2);
}

/// Found in review: each of its exports took the time of a handshake.
#[tokio::test(start_paused = true)]
async fn a_server_that_is_gone_after_its_list_is_waited_for_once() {
    let gone = AtomicBool::new(false);
    let (server, sessions) = server(move |option, _| match option {
        option::LIST => Some(listed(&[("x", ""); 30])),
        option::INFO => {
            gone.store(true, Ordering::Relaxed);
            Some(Vec::new())
        }
        _ => gone.load(Ordering::Relaxed).then(Vec::new),
    });
    let exports = look(&server, Which::All).await;
    assert!(exports.len() == 30 && exports.iter().all(|e| error(e).0 == Kind::Timeout));
    assert_eq!(sessions.load(Ordering::Relaxed), 2);
}

/// Found in review: a thousand exports were 1000 times 30 s.
#[tokio::test(start_paused = true)]
async fn a_server_that_is_silent_about_three_exports_is_asked_about_no_more() {
    let (server, sessions) = server(|option, times| match option {
        option::LIST => Some(listed(&[("x", ""); 30])),
        // The first is told of, and so is one between those that hang.
        option::INFO if [0, 2].contains(&times) => Some(told()),
        option::INFO => Some(Vec::new()),
        _ => None,
    });
    let exports = look(&server, Which::AllWithoutContexts).await;
    let (told, silent): (Vec<_>, Vec<_>) = exports.iter().partition(|e| e.told.is_ok());
    assert_eq!((told.len(), silent.len()), (2, 28));
    assert!(silent.iter().all(|e| error(e).0 == Kind::Timeout));
    // The first, and one after each that hung, but the last.
    assert_eq!(sessions.load(Ordering::Relaxed), 4);
}

/// Found in review: a server that takes one client was gone after the first it refused.
#[tokio::test]
async fn a_session_in_which_an_export_was_refused_goes_on() {
    let (server, sessions) = second_gets(option_reply(option::INFO, reply::POLICY, b"not for you"));
    let exports = look(&server, Which::AllWithoutContexts).await;
    assert_eq!(error(&exports[1]).0, Kind::Permission);
    assert!(exports[0].told.is_ok() && exports[2].told.is_ok(), "{exports:?}");
    assert_eq!(sessions.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn contexts_are_asked_for_only_where_they_are_shown() {
    let contexts = |option, _| match option {
        option::LIST => Some(listed(&THREE)),
        option::INFO => Some(told()),
        option::LIST_META_CONTEXT => Some(contexts(2, 10)),
        _ => None,
    };
    let (server, _) = server(contexts);
    let count = |exports: Vec<Described>| -> usize {
        exports.iter().map(|e| e.told.as_ref().unwrap().contexts.len()).sum()
    };
    assert_eq!(count(look(&server, Which::All).await), 6);
    assert_eq!(count(look(&server, Which::AllWithoutContexts).await), 0);
}

#[tokio::test]
async fn names_longer_than_the_protocol_allows_are_refused() {
    let (server, _) = server(|option, _| match option {
        option::INFO => Some(told()),
        option::LIST_META_CONTEXT => Some(contexts(1, 4097)),
        option::LIST => Some(listed(&[(&"n".repeat(4097), "")])),
        _ => None,
    });
    let one = describe(&server, Which::One(""), Timeouts::default()).await.map(|_| ()).unwrap_err();
    assert_eq!(one.kind(), Kind::Protocol);
    assert!(one.to_string().contains("meta context of 4097 bytes, above 4096"), "{one}");
    let all = describe(&server, Which::All, Timeouts::default()).await.map(|_| ()).unwrap_err();
    assert!(all.to_string().contains("export of 4097 bytes, above 4096"), "{all}");
}

/// 40 exports with a MiB of names each, which a server sends at the cost of its bytes.
#[tokio::test]
async fn what_a_server_makes_us_keep_of_all_its_exports_has_one_limit() {
    let exports: Vec<_> = vec![("x", ""); 40];
    let listed = listed(&exports);
    let (server, _) = server(move |option, _| match option {
        option::LIST => Some(listed.clone()),
        option::INFO => Some(told()),
        option::LIST_META_CONTEXT => Some(contexts(256, 4096)),
        _ => None,
    });
    let exports = describe(&server, Which::All, Timeouts::default()).await.unwrap().exports;
    let kept = exports.iter().filter_map(|e| e.told.as_ref().ok());
    let kept_bytes: usize = kept.flat_map(|told| &told.contexts).map(String::len).sum();
    assert!(kept_bytes <= 16 << 20, "{kept_bytes}");
    let (kind, text) = error(exports.last().unwrap());
    assert_eq!(kind, Kind::Protocol);
    assert!(text.contains("more than 16777216 bytes of replies"), "{text}");
}
