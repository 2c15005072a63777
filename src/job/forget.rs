//! Letting points go: a tombstone for each, by name or by rule. gc frees the space.

use std::collections::BTreeMap;

use serde::Serialize;

use super::list::{self, Line};
use super::{Repository, Surroundings, points};
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
    /// UUID of its VM: two may have one name.
    pub vm_uuid: Uuid,
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
    let points = match &request.what {
        What::Points(names) => named(repository, names, env).await?,
        What::Rules { vm, rules } => by_rules(repository, vm.as_deref(), rules, env).await?,
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

async fn named(
    repository: &Repository,
    names: &[String],
    env: &super::Env,
) -> Result<Vec<Verdict>> {
    // All names are resolved before anything is forgotten.
    let mut chosen = BTreeMap::new();
    for name in names {
        let point = points::find(repository, name, env).await?;
        chosen.insert(point.name(), Line::from(point));
    }
    Ok(chosen.values().map(|line| verdict(line, Vec::new(), "named")).collect())
}

async fn by_rules(
    repository: &Repository,
    vm: Option<&str>,
    rules: &KeepRules,
    env: &super::Env,
) -> Result<Vec<Verdict>> {
    if rules.is_empty() {
        return Err(Error::new(Kind::Usage, "every keep rule is zero")
            .hint("give one such as --keep-daily 7; to forget all, name each point"));
    }
    let mut list = list::run(repository, vm).await?;
    // Of one VM, whose points come one after the other: all that is held of those of others is what
    // was decided.
    let (mut points, mut verdicts) = (Vec::<Line>::new(), Vec::new());
    let mut judge = |points: Vec<Line>| {
        let times: Vec<_> = points.iter().map(|point| point.time).collect();
        let kept = retention::verdicts(&times, rules, &env.zone);
        verdicts.extend(points.iter().zip(kept).map(|(point, kept)| {
            let reasons = kept.iter().map(ToString::to_string).collect();
            verdict(point, reasons, "no rule keeps it")
        }));
    };
    while let Some(page) = list.next().await? {
        for point in page {
            if points.last().is_some_and(|last| last.vm.uuid != point.vm.uuid) {
                judge(std::mem::take(&mut points));
            }
            points.push(point);
        }
    }
    judge(points);
    Ok(verdicts)
}

/// Kept for `kept`, or forgotten for `otherwise` when there is no reason to keep it.
fn verdict(line: &Line, kept: Vec<String>, otherwise: &str) -> Verdict {
    let forgotten = kept.is_empty();
    Verdict {
        id: line.id,
        vm: line.vm.name.clone(),
        vm_uuid: line.vm.uuid,
        time: line.time,
        forgotten,
        reasons: if forgotten { vec![otherwise.to_owned()] } else { kept },
    }
}
