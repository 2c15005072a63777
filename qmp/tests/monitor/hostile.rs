//! Peers that are late, out of order, out of step, silent or hostile.

use proptest::prelude::*;
use qmp::{Error, Kind, Monitor, Options, Received};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::peer::{GREETING, Listener, SHORT, scripted};
use crate::talk::ends_in_time;

#[tokio::test]
async fn answers_find_their_commands_in_any_order() {
    let (monitor, mut peer) = scripted(Options::default()).await;
    let serve = async {
        let (first, second) = (peer.hear().await.unwrap(), peer.hear().await.unwrap());
        peer.answer(&second, "\"second\"").await;
        peer.answer(&first, "\"first\"").await;
    };
    let (a, b, ()) = tokio::join!(
        monitor.execute_raw("first", json!({})),
        monitor.execute_raw("second", json!({})),
        serve
    );
    assert_eq!((a.unwrap(), b.unwrap()), (json!("first"), json!("second")));
}

#[tokio::test]
async fn a_late_answer_goes_to_nobody() {
    let (monitor, mut peer) = scripted(SHORT).await;
    let late = monitor.execute_raw("late", json!({})).await.unwrap_err();
    assert_eq!(late.kind(), Kind::Timeout);
    assert!(late.to_string().contains("late was not answered within 300ms"), "{late}");
    let late = peer.hear().await.unwrap();
    let serve = async {
        let next = peer.hear().await.unwrap();
        peer.answer(&late, "\"late\"").await;
        peer.answer(&next, "\"next\"").await;
    };
    let (next, ()) = tokio::join!(monitor.execute_raw("next", json!({})), serve);
    assert_eq!(next.unwrap(), json!("next"));
}

#[tokio::test]
async fn an_unknown_event_reaches_subscribers_and_ends_nothing() {
    let (monitor, mut peer) = scripted(Options::default()).await;
    let mut events = monitor.subscribe();
    peer.say("{\"event\": \"SOME_NEW_EVENT_IN_11\", \"data\": {\"x\": 1}}\n").await;
    let Received::Event(event) = events.recv().await.unwrap() else { panic!("lagged") };
    assert_eq!((event.name.as_str(), &event.data["x"]), ("SOME_NEW_EVENT_IN_11", &json!(1)));
    let serve = async {
        let command = peer.hear().await.unwrap();
        peer.answer(&command, "{}").await;
    };
    let (answer, ()) = tokio::join!(monitor.execute_raw("x", json!({})), serve);
    answer.unwrap();
}

#[tokio::test]
async fn a_slow_subscriber_is_told_what_it_lost_and_hurts_nobody() {
    let (monitor, mut peer) = scripted(Options::default()).await;
    let mut slow = monitor.subscribe();
    for number in 0..3000 {
        peer.say(&format!("{{\"event\": \"E\", \"data\": {{\"n\": {number}}}}}\n")).await;
    }
    let serve = async {
        let command = peer.hear().await.unwrap();
        peer.answer(&command, "{}").await;
    };
    let (answer, ()) = tokio::join!(monitor.execute_raw("x", json!({})), serve);
    answer.unwrap();
    let Received::Lagged(lost) = slow.recv().await.unwrap() else { panic!("nothing was lost") };
    let Received::Event(next) = slow.recv().await.unwrap() else { panic!("lagged twice") };
    assert_eq!(next.data["n"], json!(lost), "the first kept event follows the lost ones");
    assert!((1500..3000).contains(&lost), "{lost}");
}

#[tokio::test]
async fn no_greeting_means_another_client() {
    let listener = Listener::new();
    let connect = Monitor::connect(&listener.address(), SHORT).await;
    assert!(matches!(connect, Err(Error::Occupied { .. })));
}

/// The greeting of a connection that was made while the one before it ended.
#[tokio::test]
async fn events_of_the_session_before_do_not_count_as_a_greeting() {
    const EVENT: &str = "{\"event\": \"JOB_STATUS_CHANGE\", \"data\": {}}\n";
    for (events, is_greeted) in [(3, true), (5000, false)] {
        let listener = Listener::new();
        let address = listener.address();
        let serve = async {
            let mut peer = listener.accept().await;
            // Who is refused has hung up before the last one.
            let _ = peer.writer.write_all(EVENT.repeat(events).as_bytes()).await;
            if is_greeted {
                peer.open().await;
            }
        };
        let (connect, ()) = tokio::join!(Monitor::connect(&address, SHORT), serve);
        match connect {
            Ok(_) => assert!(is_greeted),
            Err(error) => {
                assert!(!is_greeted && error.to_string().contains("greets first"), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn what_is_no_monitor_is_refused() {
    for (says, rule) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "a line is one JSON object"),
        ("{\"return\": {}, \"id\": 1}\n", "greets first"),
        ("{\"QMP\"", "does not end within a line"),
    ] {
        let listener = Listener::new();
        let address = listener.address();
        let serve = async {
            let mut peer = listener.accept().await;
            peer.say(says).await;
        };
        let (connect, ()) = tokio::join!(Monitor::connect(&address, SHORT), serve);
        let error = connect.err().unwrap();
        assert_eq!(error.kind(), Kind::Protocol, "{says}");
        assert!(error.to_string().contains(rule), "{error}");
    }
}

#[tokio::test]
async fn an_answer_to_nothing_closes_the_connection_and_says_why() {
    let (monitor, mut peer) = scripted(Options::default()).await;
    let serve = async {
        peer.hear().await.unwrap();
        peer.say("{\"return\": {}, \"id\": 77}\n").await;
    };
    let (answer, ()) = tokio::join!(monitor.execute_raw("x", json!({})), serve);
    let error = answer.unwrap_err();
    let cause = std::error::Error::source(&error).expect("the cause is kept");
    assert!(cause.to_string().contains("a reply belongs to a command"), "{cause}");
    assert_eq!(peer.hear().await, None, "the socket is closed");
    assert_eq!(monitor.query_status().await.unwrap_err().kind(), Kind::Connection);
}

#[tokio::test]
async fn a_peer_that_does_not_read_stops_the_queue_and_fills_no_memory() {
    let (monitor, _peer) = scripted(SHORT).await;
    let big = "x".repeat(1 << 20);
    for _ in 0..4 {
        let error = monitor.execute_raw("big", json!({ "x": big })).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Timeout);
    }
}

#[tokio::test]
async fn a_refusal_without_an_id_is_a_breach_and_no_answer() {
    let (monitor, mut peer) = scripted(Options::default()).await;
    peer.say("{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n").await;
    let error = monitor.execute_raw("x", json!({})).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Connection);
}

/// Pieces a broken or hostile monitor may send after its greeting.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        Just(b"{\"return\": {}, \"id\": 1}\n".to_vec()),
        Just(b"{\"return\": {}, \"id\": 2}\r\n".to_vec()),
        Just(b"{\"event\": \"E\"}\n".to_vec()),
        Just(b"{\"error\": {\"class\": \"\", \"desc\": \"\"}, \"id\": 2}\n".to_vec()),
        Just(GREETING.as_bytes().to_vec()),
        Just(b"\n".to_vec()),
        Just(b"{\"return\": {\"status\": 3}, ".to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever a peer sends, and wherever it stops, the client ends in time with an answer or an
    /// error and never panics.
    #[test]
    fn any_conversation_ends_in_time(
        greets: bool, pieces in prop::collection::vec(piece(), 0..12),
    ) {
        ends_in_time(greets, &pieces);
    }
}
