//! The guest agent: a real qemu-ga where one is installed is the guest test's; here the protocol,
//! with agents that are late, restarted, hung or hostile.

use std::time::Duration;

use proptest::prelude::*;
use qmp::{Agent, AgentOptions, Error, FreezeStatus, Kind};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

use crate::peer::{Listener, Peer};

const SHORT: AgentOptions =
    AgentOptions { handshake: Duration::from_millis(400), command: Duration::from_millis(400) };
const SECOND: Duration = Duration::from_secs(1);

/// The next command and whether the delimiter came before it.
async fn hear(peer: &mut Peer) -> (bool, Value) {
    let mut line = Vec::new();
    peer.reader.read_until(b'\n', &mut line).await.unwrap();
    let delimited = line.first() == Some(&0xff);
    (delimited, serde_json::from_slice(&line[usize::from(delimited)..]).unwrap())
}

async fn say(peer: &mut Peer, bytes: &[u8]) {
    peer.writer.write_all(bytes).await.unwrap();
}

/// Answers a handshake as qemu-ga does.
async fn shake(peer: &mut Peer) {
    let (delimited, sync) = hear(peer).await;
    assert!(delimited);
    assert_eq!(sync["execute"], "guest-sync-delimited");
    let mut answer = vec![0xff];
    answer.extend(json!({ "return": sync["arguments"]["id"] }).to_string().bytes());
    answer.push(b'\n');
    say(peer, &answer).await;
}

async fn connected() -> (Agent, Peer) {
    let listener = Listener::new();
    let address = listener.address();
    let serve = async {
        let mut peer = listener.accept().await;
        shake(&mut peer).await;
        peer
    };
    let (agent, peer) = tokio::join!(Agent::connect(&address, SHORT), serve);
    (agent.unwrap(), peer)
}

#[tokio::test]
async fn freeze_status_thaw() {
    let (mut agent, mut peer) = connected().await;
    let serve = async {
        for (command, answer) in [
            ("guest-fsfreeze-freeze", "{\"return\": 3}\n"),
            ("guest-fsfreeze-status", "{\"return\": \"frozen\"}\n"),
            ("guest-fsfreeze-thaw", "{\"return\": 3}\n"),
        ] {
            let (delimited, heard) = hear(&mut peer).await;
            assert!(!delimited, "one handshake is enough while all goes well");
            assert_eq!(heard["execute"], command);
            say(&mut peer, answer.as_bytes()).await;
        }
    };
    let talk = async {
        assert_eq!(agent.freeze(SECOND).await.unwrap(), 3);
        assert_eq!(agent.freeze_status().await.unwrap(), FreezeStatus::Frozen);
        assert_eq!(agent.thaw(SECOND).await.unwrap(), 3);
    };
    tokio::join!(serve, talk);
}

#[tokio::test]
async fn the_rest_of_an_older_conversation_is_dropped() {
    let listener = Listener::new();
    let address = listener.address();
    let serve = async {
        let mut peer = listener.accept().await;
        say(&mut peer, b"{\"return\": 9}\n{\"error\": {\"class\": \"G\", \"desc\": \"x\"}}\n")
            .await;
        say(&mut peer, b"\xff{\"return\": 4711}\n{\"half\": ").await;
        shake(&mut peer).await;
        peer
    };
    let (agent, _peer) = tokio::join!(Agent::connect(&address, SHORT), serve);
    agent.unwrap();
}

#[tokio::test]
async fn a_freeze_past_its_deadline_is_followed_by_its_thaw() {
    let (mut agent, mut peer) = connected().await;
    let serve = async {
        let (_, freeze) = hear(&mut peer).await;
        assert_eq!(freeze["execute"], "guest-fsfreeze-freeze");
        tokio::time::sleep(Duration::from_millis(300)).await;
        say(&mut peer, b"{\"return\": 2}\n").await; // too late: nobody may take it for the thaw's
        shake(&mut peer).await;
        let (_, thaw) = hear(&mut peer).await;
        assert_eq!(thaw["execute"], "guest-fsfreeze-thaw");
        say(&mut peer, b"{\"return\": 1}\n").await;
    };
    let talk = async {
        let late = agent.freeze(Duration::from_millis(100)).await.unwrap_err();
        assert_eq!(late.kind(), Kind::Timeout);
        assert_eq!(agent.thaw(SECOND).await.unwrap(), 1);
    };
    tokio::join!(serve, talk);
}

#[tokio::test]
async fn a_dropped_command_leaves_the_connection_usable() {
    let (mut agent, mut peer) = connected().await;
    let dropped = tokio::time::timeout(Duration::from_millis(50), agent.freeze(SECOND)).await;
    assert!(dropped.is_err());
    let serve = async {
        hear(&mut peer).await;
        say(&mut peer, b"{\"return\": 2}\n").await;
        shake(&mut peer).await;
        hear(&mut peer).await;
        say(&mut peer, b"{\"return\": 2}\n").await;
    };
    let (thawed, ()) = tokio::join!(agent.thaw(SECOND), serve);
    assert_eq!(thawed.unwrap(), 2);
}

#[tokio::test]
async fn a_refusal_is_the_guests_own_words() {
    let (mut agent, mut peer) = connected().await;
    let serve = async {
        hear(&mut peer).await;
        let refusal = json!({ "error": { "class": "CommandNotFound", "desc": "disabled" } });
        say(&mut peer, format!("{refusal}\n").as_bytes()).await;
    };
    let (frozen, ()) = tokio::join!(agent.freeze(SECOND), serve);
    let error = frozen.unwrap_err();
    assert_eq!((error.kind(), error.refusal()), (Kind::Unsupported, Some("disabled")));
}

#[tokio::test]
async fn an_agent_that_never_answers_is_given_up_in_time() {
    let listener = Listener::new();
    let agent = Agent::connect(&listener.address(), SHORT).await;
    assert!(matches!(agent.err().unwrap(), Error::Occupied { .. }));
}

#[tokio::test]
async fn a_guest_that_floods_the_channel_is_cut_off() {
    let listener = Listener::new();
    let address = listener.address();
    let serve = async {
        let mut peer = listener.accept().await;
        let junk = vec![b'x'; 1 << 16];
        while peer.writer.write_all(&junk).await.is_ok() {}
    };
    let connect = async { Agent::connect(&address, SHORT).await.err().unwrap() };
    let (error, ()) = tokio::join!(connect, serve);
    assert_eq!(error.kind(), Kind::Protocol);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_says_ends_in_time(
        pieces in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            Just(b"\xff{\"return\": 1}\n".to_vec()),
            Just(b"{\"return\": 1}\n".to_vec()),
            Just(b"\xff{\"return\": 2}\n{}\n".to_vec()),
        ], 0..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = Listener::new();
            let address = listener.address();
            let deadline = Duration::from_millis(30);
            let options = AgentOptions { handshake: deadline, command: deadline };
            let serve = async {
                let mut peer = listener.accept().await;
                for bytes in pieces {
                    let _ = peer.writer.write_all(&bytes).await;
                }
            };
            let talk = async {
                if let Ok(mut agent) = Agent::connect(&address, options).await {
                    let _ = agent.freeze(deadline).await;
                    let _ = agent.thaw(deadline).await;
                }
            };
            let both = async { tokio::join!(serve, talk) };
            tokio::time::timeout(SECOND * 5, both).await.expect("it ends in time");
        });
    }
}
