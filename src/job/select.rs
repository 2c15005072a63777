//! Naming restore points: `3f9a`, `foo@latest`, `foo@2026-11-20T22:00`.
//!
//! Pure: the points, in the repository's order (oldest first), and the text go in, one point or an
//! error that lists what was meant comes out. `latest` follows that order and not the clock, and
//! a VM is its UUID: a name borne by two VMs is ambiguous.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;

use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::vm::{PointId, Uuid};

/// What of a point its names are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointRef {
    /// Its id.
    pub id: PointId,
    /// UUID of its VM.
    pub vm: Uuid,
    /// Name of its VM at the time.
    pub name: String,
    /// When it was taken.
    pub time: Timestamp,
}

/// Most candidates an error lists.
const LISTED_MAX: usize = 10;

/// The point that `text` names among `points` (oldest first). Times without an offset are times
/// of `zone`.
pub fn point<'a>(points: &'a [PointRef], text: &str, zone: &TimeZone) -> Result<&'a PointRef> {
    match text.rsplit_once('@') {
        Some((vm, when)) => at(points, vm, when, zone),
        None => by_prefix(points, text, zone),
    }
}

/// The VM that `text` names (by name, UUID, or prefix of a UUID of eight or more digits) among
/// those that have points; its points in order.
pub fn vm<'a>(points: &'a [PointRef], text: &str) -> Result<(Uuid, Vec<&'a PointRef>)> {
    let mut found: BTreeMap<Uuid, Vec<&PointRef>> = BTreeMap::new();
    for point in points.iter().filter(|point| point.name == text) {
        found.entry(point.vm).or_default().push(point);
    }
    if found.is_empty() {
        let is_prefix = |uuid: &Uuid| text.len() >= 8 && uuid.to_string().starts_with(text);
        for point in points.iter().filter(|point| is_prefix(&point.vm)) {
            found.entry(point.vm).or_default().push(point);
        }
    }
    if found.len() > 1 {
        let list: Vec<String> = found.iter().map(|(uuid, p)| describe_vm(uuid, p)).collect();
        return Err(Error::new(
            Kind::Ambiguous,
            format!("'{text}' means {} VMs: {}", list.len(), join(&list)),
        )
        .hint("name the VM by its UUID"));
    }
    let Some((uuid, _)) = found.pop_first() else {
        return Err(no_such_vm(points, text));
    };
    // A VM may have changed its name: its points are all that bear its UUID.
    Ok((uuid, points.iter().filter(|point| point.vm == uuid).collect()))
}

fn at<'a>(
    points: &'a [PointRef],
    vm_text: &str,
    when: &str,
    zone: &TimeZone,
) -> Result<&'a PointRef> {
    let (_, mut candidates) = vm(points, vm_text)?;
    if when != "latest" {
        let end = end_of(when, zone)?;
        candidates.retain(|point| point.time < end);
    }
    candidates.last().copied().ok_or_else(|| {
        let first = points.iter().find(|point| point.name == vm_text);
        let error =
            Error::new(Kind::NotFound, format!("no point of {vm_text} is as old as {when}"));
        match first {
            Some(first) => error.hint(format!("its oldest is {}", describe(first, zone))),
            None => error,
        }
    })
}

fn by_prefix<'a>(points: &'a [PointRef], text: &str, zone: &TimeZone) -> Result<&'a PointRef> {
    let hint = if points.iter().any(|point| point.name == text) {
        format!("write {text}@latest for the newest point of {text}")
    } else {
        "'vmbackup list' shows the points of this repository".to_owned()
    };
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        let message = format!("'{text}' names no point: it is neither an id nor VM@TIME");
        return Err(Error::new(Kind::NotFound, message).hint(hint));
    }
    let prefix = text.to_ascii_lowercase();
    let found: Vec<_> =
        points.iter().filter(|point| point.id.to_string().starts_with(&prefix)).collect();
    match found[..] {
        [] => {
            Err(Error::new(Kind::NotFound, format!("no point's id begins with '{text}'"))
                .hint(hint))
        }
        [one] => Ok(one),
        _ => {
            let list: Vec<String> = found.iter().map(|point| describe(point, zone)).collect();
            Err(Error::new(
                Kind::Ambiguous,
                format!("'{text}' begins the ids of {} points: {}", found.len(), join(&list)),
            )
            .hint("write more digits of the id"))
        }
    }
}

/// The first instant after what `text` says: after the minute of `…T22:00`, after the second of
/// `…T22:00:30`, after the day of a date. So a time copied from a list finds the point it was
/// listed with.
fn end_of(text: &str, zone: &TimeZone) -> Result<Timestamp> {
    let bad = || {
        Error::new(Kind::Usage, format!("'{text}' is not a time"))
            .hint("write @latest, @2026-11-20, @2026-11-20T22:00 or @2026-11-20T22:00:05Z")
    };
    let local = |civil: DateTime| civil.to_zoned(zone.clone()).map(|z| z.timestamp());
    let (start, unit) = if let Ok(time) = text.parse::<Timestamp>() {
        (time, precision(text))
    } else if text.contains(['T', 't', ' ']) {
        let civil: DateTime = text.parse().map_err(|_| bad())?;
        (local(civil).map_err(|_| bad())?, precision(text))
    } else {
        let date: Date = text.parse().map_err(|_| bad())?;
        let next = date.tomorrow().map_err(|_| bad())?;
        return local(next.to_datetime(jiff::civil::Time::midnight())).map_err(|_| bad());
    };
    start.checked_add(unit).map_err(|_| bad())
}

/// The unit of the last part of a time that was written: a minute or a second.
fn precision(text: &str) -> jiff::SignedDuration {
    let time = text.split(['T', 't', ' ']).nth(1).unwrap_or_default();
    let time = time.split(['Z', 'z', '+', '-']).next().unwrap_or_default();
    match time.matches(':').count() {
        0 | 1 => jiff::SignedDuration::from_secs(60),
        _ => jiff::SignedDuration::from_secs(1),
    }
}

fn no_such_vm(points: &[PointRef], text: &str) -> Error {
    let names: BTreeSet<&str> = points.iter().map(|point| point.name.as_str()).collect();
    let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    let error = Error::new(Kind::NotFound, format!("no point of a VM '{text}' is here"));
    if names.is_empty() {
        error.hint("the repository holds no points")
    } else {
        error.hint(format!("it holds points of {}", join(&names)))
    }
}

fn describe(point: &PointRef, zone: &TimeZone) -> String {
    let time = point.time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S");
    format!("{} ({} {time})", point.id.short(), point.name)
}

fn describe_vm(uuid: &Uuid, points: &[&PointRef]) -> String {
    let name = points.last().map_or("", |point| point.name.as_str());
    format!("{uuid} ({name}, {} points)", points.len())
}

/// At most [`LISTED_MAX`] of `list`, and how many more there are.
fn join(list: &[String]) -> String {
    let mut text = list[..list.len().min(LISTED_MAX)].join(", ");
    if list.len() > LISTED_MAX {
        let _ = write!(text, " and {} more", list.len() - LISTED_MAX);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point_ref(id: u8, vm: u128, name: &str, time: &str) -> PointRef {
        let mut bytes = [0; 16];
        bytes[0] = id;
        PointRef {
            id: PointId(bytes),
            vm: Uuid::from_u128(vm),
            name: name.into(),
            time: time.parse().unwrap(),
        }
    }

    fn points() -> Vec<PointRef> {
        vec![
            point_ref(0xa1, 1, "foo", "2026-11-20T20:00:00Z"),
            point_ref(0xa2, 2, "bar", "2026-11-20T20:30:00Z"),
            point_ref(0xb1, 1, "foo", "2026-11-20T21:00:30.5Z"),
            // A clock that stepped back: still the newest point of foo.
            point_ref(0xb2, 1, "foo", "2026-11-20T19:00:00Z"),
        ]
    }

    fn named(text: &str) -> Result<String> {
        point(&points(), text, &TimeZone::UTC).map(|point| point.id.short()[..2].to_owned())
    }

    #[test]
    fn an_id_prefix_names_one_point_or_lists_all_it_could_mean() {
        assert_eq!(named("a1").unwrap(), "a1");
        assert_eq!(named("B2000").unwrap(), "b2");
        let error = named("a").unwrap_err();
        assert_eq!(error.kind(), Kind::Ambiguous);
        assert!(error.to_string().contains("a1000000 (foo 2026-11-20 20:00:00), a2000000"));
        assert_eq!(named("c").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(named("").unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn a_bare_vm_name_gets_the_hint_to_write_latest() {
        let error = named("foo").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.hint_text().unwrap().contains("foo@latest"));
    }

    #[test]
    fn latest_follows_the_repository_and_not_the_clock() {
        assert_eq!(named("foo@latest").unwrap(), "b2");
        assert_eq!(named("bar@latest").unwrap(), "a2");
    }

    #[test]
    fn a_time_names_the_newest_point_not_later() {
        assert_eq!(named("bar@2026-11-20T20:30").unwrap(), "a2");
        assert_eq!(named("bar@2026-11-20").unwrap(), "a2");
        assert_eq!(named("bar@2026-11-20T20:29").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(named("bar@2026-11-19").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(named("bar@noon").unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_time_copied_from_a_list_finds_the_point_listed_with_it() {
        let points = &points()[..3];
        for text in ["foo@2026-11-20T21:00", "foo@2026-11-20T21:00:30", "foo@2026-11-20T21:00:30Z"]
        {
            assert_eq!(point(points, text, &TimeZone::UTC).unwrap().id, points[2].id, "{text}");
        }
        let earlier = point(points, "foo@2026-11-20T21:00:29", &TimeZone::UTC).unwrap();
        assert_eq!(earlier.id, points[0].id);
    }

    #[test]
    fn times_without_an_offset_are_local() {
        let zone = TimeZone::fixed(jiff::tz::offset(1));
        let at = |text: &str| point(&points()[..3], text, &zone).map(|p| p.id.0[0]);
        assert_eq!(at("foo@2026-11-20T21:00").unwrap(), 0xa1);
        assert_eq!(at("foo@2026-11-20T22:00").unwrap(), 0xb1);
        assert_eq!(at("foo@2026-11-20T22:00+01:00").unwrap(), 0xb1);
    }

    #[test]
    fn a_name_of_two_vms_is_ambiguous_and_a_uuid_is_not() {
        let mut points = points();
        points.push(point_ref(0xc1, 3, "foo", "2026-11-21T00:00:00Z"));
        let error = point(&points, "foo@latest", &TimeZone::UTC).unwrap_err();
        assert_eq!(error.kind(), Kind::Ambiguous);
        let uuid = Uuid::from_u128(1).to_string();
        assert!(error.to_string().contains(&uuid));
        let found = point(&points, &format!("{uuid}@latest"), &TimeZone::UTC).unwrap();
        assert_eq!(found.id.0[0], 0xb2);
    }

    #[test]
    fn an_unknown_vm_lists_the_names_that_exist() {
        let error = named("baz@latest").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert_eq!(error.hint_text(), Some("it holds points of bar, foo"));
    }
}
