//! What a monitor says: one JSON text a line, told apart and checked. Pure; fuzzed.
//!
//! The QMP specification (docs/interop/qmp-spec.rst) has five: the greeting, a return, an error,
//! an event, and, for input it cannot parse, an error without an id. Unknown members are ignored
//! and unknown events, classes and capabilities kept as text: QEMU adds some in every release.

use serde_json::{Map, Value};

use crate::error::ErrorClass;
use crate::events::Event;

/// The version of a QEMU. To be shown, not decided on: distributions backport; see
/// [`Features`](crate::Features).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Major, minor and micro number.
    pub number: (u64, u64, u64),
    /// The distribution's name for it, or empty.
    pub package: String,
}

/// The first thing a monitor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The QEMU.
    pub version: Version,
    /// Capabilities on offer (`oob`).
    pub capabilities: Vec<String>,
}

/// One line of a monitor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Incoming {
    Greeting(Greeting),
    Return { id: u64, value: Value },
    Failure { id: u64, class: ErrorClass, message: String },
    Event(Event),
}

/// The rule a line broke, and what the parser said if it was not JSON at all.
#[derive(Debug)]
pub(crate) struct Malformed {
    pub(crate) rule: &'static str,
    pub(crate) source: Option<serde_json::Error>,
}

impl Malformed {
    fn rule(rule: &'static str) -> Self {
        Self { rule, source: None }
    }
}

impl Incoming {
    /// Reads one line.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Malformed> {
        let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(|error| {
            Malformed { rule: "a line is one JSON object", source: Some(error) }
        })?;
        if let Some(value) = object.swap_remove("return") {
            return Ok(Self::Return { id: reply_id(&object)?, value });
        }
        if let Some(error) = object.swap_remove("error") {
            let text = |key| error.get(key).and_then(Value::as_str);
            let (Some(class), Some(message)) = (text("class"), text("desc")) else {
                return Err(Malformed::rule("an error has a class and a description"));
            };
            let class = ErrorClass::from_wire(class);
            return Ok(Self::Failure {
                id: reply_id(&object)?,
                class,
                message: message.to_owned(),
            });
        }
        if let Some(name) = object.swap_remove("event") {
            return event(&name, object).map(Self::Event);
        }
        match object.swap_remove("QMP") {
            Some(value) => greeting(&value).map(Self::Greeting),
            None => Err(Malformed::rule("a line is a greeting, a return, an error or an event")),
        }
    }
}

/// Every command of ours carries a number as id, so every reply has to echo one.
fn reply_id(object: &Map<String, Value>) -> Result<u64, Malformed> {
    let id = object.get("id").and_then(Value::as_u64);
    id.ok_or(Malformed::rule("a reply echoes the id of its command"))
}

fn event(name: &Value, mut object: Map<String, Value>) -> Result<Event, Malformed> {
    let name = name.as_str().ok_or(Malformed::rule("the name of an event is a string"))?;
    let stamp = object.get("timestamp").and_then(|stamp| {
        let part = |key| stamp.get(key).and_then(Value::as_i64);
        // QEMU says -1 when the host's clock failed (qmp-spec, "Asynchronous events").
        part("seconds").zip(part("microseconds")).filter(|(seconds, _)| *seconds >= 0)
    });
    Ok(Event {
        name: name.to_owned(),
        data: object.swap_remove("data").unwrap_or_else(|| Value::Object(Map::new())),
        timestamp: stamp,
    })
}

fn greeting(value: &Value) -> Result<Greeting, Malformed> {
    let number = |part| value.pointer(&format!("/version/qemu/{part}")).and_then(Value::as_u64);
    let (Some(major), Some(minor), Some(micro)) =
        (number("major"), number("minor"), number("micro"))
    else {
        return Err(Malformed::rule("the greeting carries QEMU's version"));
    };
    let package = value.pointer("/version/package").and_then(Value::as_str).unwrap_or_default();
    let capabilities = value.get("capabilities").and_then(Value::as_array);
    Ok(Greeting {
        version: Version { number: (major, minor, micro), package: package.to_owned() },
        capabilities: capabilities
            .map(|list| list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            .unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian 1:10.0.2"}, "capabilities": ["oob", "later"]}}"#;

    #[test]
    fn a_greeting_keeps_capabilities_it_does_not_know() {
        let Incoming::Greeting(greeting) = Incoming::parse(GREETING.as_bytes()).unwrap() else {
            panic!("not a greeting");
        };
        assert_eq!(greeting.version.number, (10, 0, 2));
        assert_eq!(greeting.capabilities, ["oob", "later"]);
    }

    #[test]
    fn an_unknown_event_passes_through_whole() {
        let line = br#"{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "NEW_IN_42", "data": {"x": [1]}}"#;
        let Incoming::Event(event) = Incoming::parse(line).unwrap() else { panic!("not an event") };
        assert_eq!(event.name, "NEW_IN_42");
        assert_eq!(event.data["x"][0], 1);
        assert_eq!(event.timestamp, Some((5, 7)));
    }

    #[test]
    fn a_null_return_is_a_return() {
        let parsed = Incoming::parse(br#"{"return": null, "id": 3}"#).unwrap();
        assert_eq!(parsed, Incoming::Return { id: 3, value: Value::Null });
    }

    #[test]
    fn what_breaks_a_rule_names_the_rule() {
        for (line, rule) in [
            ("[]", "one JSON object"),
            ("", "one JSON object"),
            ("{}", "a greeting, a return"),
            (r#"{"return": {}}"#, "echoes the id"),
            (r#"{"return": {}, "id": "1"}"#, "echoes the id"),
            (r#"{"error": {"class": "X"}, "id": 1}"#, "class and a description"),
            (r#"{"event": 1}"#, "name of an event"),
            (r#"{"QMP": {}}"#, "QEMU's version"),
        ] {
            let malformed = Incoming::parse(line.as_bytes()).unwrap_err();
            assert!(malformed.rule.contains(rule), "{line}: {}", malformed.rule);
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let line =
            format!("{{\"return\": {}{}, \"id\": 1}}", "[".repeat(1 << 20), "]".repeat(1 << 20));
        assert!(Incoming::parse(line.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(line in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Incoming::parse(&line);
        }

        #[test]
        fn a_damaged_line_is_read_or_refused(
            at in 0..GREETING.len(), byte: u8, cut in 0..GREETING.len(),
        ) {
            let mut line = GREETING.as_bytes().to_vec();
            line[at] = byte;
            line.truncate(line.len() - cut);
            let _ = Incoming::parse(&line);
        }
    }
}
