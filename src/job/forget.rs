//! Letting points go: a tombstone for each, by name or by rule. gc frees the space.

use std::collections::BTreeMap;

use serde::Serialize;

use super::list::Line;
use super::{Repository, Surroundings, points, select};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::policy::retention::{self, KeepRules};
use crate::vm::{PointId, Uuid};

/// What to forget.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which points.
    pub what: What,
    /// Whether to do it.
    pub effect: Effect,
}

/// Which points to forget.
#[derive(Clone, Debug)]
pub enum What {
    /// These, as they were named.
    Points(Vec<String>),
    /// Those that no rule keeps.
    Rules {
        /// Of this VM only.
        vm: Option<String>,
        /// The rules.
        rules: KeepRules,
    },
}

/// Whether to do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Only say what would happen.
    DryRun,
    /// Do it.
    Forget,
}

/// What was decided about each point looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The points, in the repository's order.
    pub points: Vec<Verdict>,
}

/// What was decided about a point.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Its id.
    pub id: PointId,
    /// Name of its VM.
    pub vm: String,
    /// The instant.
    pub time: Timestamp,
    /// Whether it is forgotten.
    pub forgotten: bool,
    /// Why it is kept, or forgotten.
    pub reasons: Vec<String>,
}

/// Forgets points. Stops between two points when asked to: what was forgotten stays so.
pub async fn run(
    repository: &Repository,
    request: Request,
    (env, control): Surroundings<'_>,
) -> Result<Report> {
    let lines = points::lines(repository).await?;
    let points = match &request.what {
        What::Points(names) => named(&lines, names, env)?,
        What::Rules { vm, rules } => by_rules(&lines, vm.as_deref(), rules, env)?,
    };
    let report = Report { dry_run: request.effect == Effect::DryRun, points };
    if request.effect == Effect::Forget {
        for verdict in report.points.iter().filter(|verdict| verdict.forgotten) {
            control.check()?;
            repository.forget(verdict.id).await?;
        }
    }
    Ok(report)
}

fn named(lines: &[Line], names: &[String], env: &super::Env) -> Result<Vec<Verdict>> {
    let refs: Vec<_> = lines.iter().map(Line::reference).collect();
    let mut ids = Vec::new();
    // All names are resolved before anything is forgotten.
    for name in names {
        ids.push(select::point(&refs, name, &env.zone)?.id);
    }
    let chosen = lines.iter().filter(|line| ids.contains(&line.id));
    Ok(chosen.map(|line| verdict(line, Vec::new(), "named")).collect())
}

fn by_rules(
    lines: &[Line],
    vm: Option<&str>,
    rules: &KeepRules,
    env: &super::Env,
) -> Result<Vec<Verdict>> {
    if rules.is_empty() {
        return Err(Error::new(Kind::Usage, "every keep rule is zero")
            .hint("give one such as --keep-daily 7; to forget all, name each point"));
    }
    let refs: Vec<_> = lines.iter().map(Line::reference).collect();
    let only = vm.map(|vm| select::vm(&refs, vm)).transpose()?.map(|(uuid, _)| uuid);
    let mut by_vm: BTreeMap<Uuid, Vec<usize>> = BTreeMap::new();
    for (index, line) in lines.iter().enumerate() {
        if only.is_none_or(|uuid| uuid == line.vm.uuid) {
            by_vm.entry(line.vm.uuid).or_default().push(index);
        }
    }
    let mut found = Vec::new();
    for indexes in by_vm.into_values() {
        let times: Vec<_> = indexes.iter().map(|index| lines[*index].time).collect();
        let kept = retention::verdicts(&times, rules, &env.zone);
        found.extend(indexes.into_iter().zip(kept));
    }
    found.sort_by_key(|(index, _)| *index);
    Ok(found
        .into_iter()
        .map(|(index, kept)| {
            let reasons = kept.iter().map(ToString::to_string).collect();
            verdict(&lines[index], reasons, "no rule keeps it")
        })
        .collect())
}

/// Kept for `kept`, or forgotten for `otherwise` when there is no reason to keep it.
fn verdict(line: &Line, kept: Vec<String>, otherwise: &str) -> Verdict {
    let forgotten = kept.is_empty();
    Verdict {
        id: line.id,
        vm: line.vm.name.clone(),
        time: line.time,
        forgotten,
        reasons: if forgotten { vec![otherwise.to_owned()] } else { kept },
    }
}
