//! Which points of a VM are kept, and by which rule.
//!
//! Pure: points in the repository's order (oldest first) and rules go in, a verdict per point
//! comes out. A rule such as *daily 7* keeps the newest point of each of the seven newest days
//! that have one; days without a point do not count. "Newest" is the order in the repository, so
//! a clock that stepped back never makes an old point look like the latest. The newest point of a
//! VM is always kept: forgetting everything takes naming each point.

use std::collections::HashSet;
use std::fmt;

use jiff::tz::TimeZone;

use crate::clock::Timestamp;

/// How many of each period to keep; zero switches a rule off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepRules {
    /// The newest so many points.
    pub last: u32,
    /// Newest point of so many hours.
    pub hourly: u32,
    /// Newest point of so many days.
    pub daily: u32,
    /// Newest point of so many weeks (ISO 8601, from Monday on).
    pub weekly: u32,
    /// Newest point of so many months.
    pub monthly: u32,
    /// Newest point of so many years.
    pub yearly: u32,
}

impl KeepRules {
    /// Whether no rule is on.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a point is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeepReason {
    /// It is the newest of its VM.
    Newest,
    /// It is the `n`th newest (from 1).
    Last(u32),
    /// It is the newest of a period that counts.
    Period {
        /// The rule: `hourly`, `daily`, `weekly`, `monthly` or `yearly`.
        rule: &'static str,
        /// The period, in local time (`2026-11-20`, `2026-W47`).
        period: String,
    },
}

impl fmt::Display for KeepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => write!(f, "newest"),
            Self::Last(n) => write!(f, "last {n}"),
            Self::Period { rule, period } => write!(f, "{rule} {period}"),
        }
    }
}

/// Why each of `times` (the points of one VM, oldest first) is kept; an empty list says that no
/// rule keeps it. Periods are those of `zone`.
pub fn verdicts(times: &[Timestamp], rules: &KeepRules, zone: &TimeZone) -> Vec<Vec<KeepReason>> {
    let mut periods = [
        Periods::new("hourly", rules.hourly, "%Y-%m-%d %H:00 %:z"),
        Periods::new("daily", rules.daily, "%Y-%m-%d"),
        Periods::new("weekly", rules.weekly, "%G-W%V"),
        Periods::new("monthly", rules.monthly, "%Y-%m"),
        Periods::new("yearly", rules.yearly, "%Y"),
    ];
    let mut verdicts: Vec<Vec<KeepReason>> = (1_u32..)
        .zip(times.iter().rev())
        .map(|(nth, time)| {
            let mut reasons = Vec::new();
            if nth <= rules.last {
                reasons.push(KeepReason::Last(nth));
            }
            let local = time.to_zoned(zone.clone());
            reasons.extend(periods.iter_mut().filter_map(|periods| periods.take(&local)));
            if nth == 1 && reasons.is_empty() {
                reasons.push(KeepReason::Newest);
            }
            reasons
        })
        .collect();
    verdicts.reverse();
    verdicts
}

/// The periods of one rule, taken newest first.
struct Periods {
    rule: &'static str,
    left: u32,
    format: &'static str,
    seen: HashSet<String>,
}

impl Periods {
    fn new(rule: &'static str, left: u32, format: &'static str) -> Self {
        Self { rule, left, format, seen: HashSet::new() }
    }

    /// The reason to keep a point of `time`, if it is the first of its period and one is left.
    fn take(&mut self, time: &jiff::Zoned) -> Option<KeepReason> {
        let period = time.strftime(self.format).to_string();
        if self.left == 0 || !self.seen.insert(period.clone()) {
            return None;
        }
        self.left -= 1;
        Some(KeepReason::Period { rule: self.rule, period })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept(times: &[&str], rules: &KeepRules) -> Vec<String> {
        let times: Vec<Timestamp> = times.iter().map(|time| time.parse().unwrap()).collect();
        let text = |reasons: Vec<KeepReason>| {
            reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        verdicts(&times, rules, &TimeZone::UTC).into_iter().map(text).collect()
    }

    #[test]
    fn a_daily_rule_keeps_the_newest_of_each_day_and_skips_days_without_points() {
        let rules = KeepRules { daily: 2, ..KeepRules::default() };
        let times = [
            "2026-11-01T00:00:00Z",
            "2026-11-02T01:00:00Z",
            "2026-11-02T23:00:00Z",
            "2026-11-20T01:00:00Z",
            "2026-11-20T02:00:00Z",
        ];
        assert_eq!(kept(&times, &rules), ["", "", "daily 2026-11-02", "", "daily 2026-11-20"]);
    }

    #[test]
    fn rules_add_up_and_each_names_itself() {
        let rules = KeepRules { last: 1, weekly: 1, yearly: 2, ..KeepRules::default() };
        let times = ["2025-06-01T00:00:00Z", "2026-01-01T00:00:00Z", "2026-11-20T00:00:00Z"];
        assert_eq!(
            kept(&times, &rules),
            ["yearly 2025", "", "last 1, weekly 2026-W47, yearly 2026"]
        );
    }

    #[test]
    fn without_rules_only_the_newest_stays() {
        let times = ["2026-01-01T00:00:00Z", "2025-01-01T00:00:00Z"];
        assert_eq!(kept(&times, &KeepRules::default()), ["", "newest"]);
    }

    #[test]
    fn the_hour_that_is_twice_when_clocks_go_back_counts_as_two() {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let times = ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"].map(|t| t.parse().unwrap());
        let rules = KeepRules { hourly: 2, ..KeepRules::default() };
        assert!(verdicts(&times, &rules, &zone).iter().all(|reasons| reasons.len() == 1));
    }

    proptest! {
        #[test]
        fn no_rule_keeps_more_than_its_number_and_the_newest_always_stays(
            seconds in prop::collection::vec(0i64..4_000_000_000, 1..60),
            (last, hourly, daily, weekly, monthly, yearly) in
                (0u32..5, 0u32..5, 0u32..5, 0u32..5, 0u32..5, 0u32..5),
        ) {
            let rules = KeepRules { last, hourly, daily, weekly, monthly, yearly };
            let times: Vec<_> =
                seconds.iter().map(|s| Timestamp::from_second(*s).unwrap()).collect();
            let verdicts = verdicts(&times, &rules, &TimeZone::UTC);
            prop_assert_eq!(verdicts.len(), times.len());
            prop_assert!(!verdicts.last().unwrap().is_empty());
            let of = |name: &str| verdicts.iter().flatten()
                .filter(|r| matches!(r, KeepReason::Period { rule, .. } if *rule == name)).count();
            for (name, max) in
                [("hourly", hourly), ("daily", daily), ("weekly", weekly), ("monthly", monthly), ("yearly", yearly)]
            {
                prop_assert!(of(name) <= max as usize);
            }
            let lasts = verdicts.iter().flatten().filter(|r| matches!(r, KeepReason::Last(_))).count();
            prop_assert_eq!(lasts, times.len().min(last as usize));
        }
    }
}
