//! Servers that say that they go away: what they refuse then failed with the connection, so that whoever
//! may try again does.

use std::sync::atomic::{AtomicBool, Ordering};

use vmbackup::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode};
use vmbackup::error::{Error, Kind};
use vmbackup::nbd::wire::{HeaderStyle, chunk, errno, option, reply};
use vmbackup::nbd::{ClientOptions, list};

use crate::script::{Asked, Scripted, error_payload, honest, option_reply, play, timeouts};
use crate::support::writing;

const STYLES: [HeaderStyle; 3] =
    [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

/// A server that refuses every request and goes on listening.
fn leaving(style: HeaderStyle) -> Scripted {
    Scripted::new(move |stream| async move {
        let act = |asked: &Asked| {
            if style == HeaderStyle::Simple {
                return asked.simple(errno::ESHUTDOWN);
            }
            let payload = error_payload(errno::ESHUTDOWN, b"an update");
            asked.chunk(chunk::DONE, chunk::ERROR, &payload)
        };
        play(stream, style, |option| honest(style, option), act).await;
    })
}

fn is_of_the_connection(error: &Error) {
    assert_eq!(error.kind(), Kind::Connection, "{error:?}");
    assert!(error.to_string().contains("shutting down"), "{error}");
}

#[tokio::test]
async fn what_a_leaving_server_refuses_failed_with_the_connection() {
    for style in STYLES {
        let client = leaving(style).open_with(writing()).await.unwrap();
        assert_eq!(client.header_style(), style);
        let range = ByteRange::new(0, 4096);
        let read = client.read(0, Buffer::unbudgeted(vec![0xee; 4096])).await;
        is_of_the_connection(&read.map(|_| ()).unwrap_err());
        is_of_the_connection(&client.zero(range, ZeroMode::Sparse).await.unwrap_err());
        is_of_the_connection(&client.flush().await.unwrap_err());
        if style != HeaderStyle::Simple {
            let error = client.extents(range).await.map(|_| ()).unwrap_err();
            is_of_the_connection(&error);
            assert!(error.to_string().contains("an update"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_server_that_leaves_while_it_is_asked_for_an_export_is_no_other_export() {
    for refused in [option::GO, option::SET_META_CONTEXT, option::LIST] {
        let server = Scripted::new(move |stream| async move {
            // All that follows is refused as well.
            let left = AtomicBool::new(false);
            let say = |option| {
                if option == refused {
                    left.store(true, Ordering::Relaxed);
                }
                if left.load(Ordering::Relaxed) {
                    option_reply(option, reply::SHUTDOWN, b"an update")
                } else {
                    honest(HeaderStyle::Structured, option)
                }
            };
            play(stream, HeaderStyle::Structured, say, |_| Vec::new()).await;
        });
        let error = match refused {
            option::LIST => list(&server, timeouts()).await.map(|_| ()),
            _ => server.open_with(ClientOptions::default()).await.map(|_| ()),
        };
        is_of_the_connection(&error.unwrap_err());
    }
}
