//! Progress of a job while it runs: bars on a terminal, lines in a log, JSON lines for machines.
//!
//! Samples the counters of a [`Control`] beside the job; the job never waits for it. Notices come
//! out as they happen, in every style, each once.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::output::{Output, line, say};
use super::text::shown;
use crate::control::{Control, DiskProgress};
use crate::units::ByteSize;

/// How often the counters are looked at.
const SAMPLE: Duration = Duration::from_millis(100);
/// The rate is that of the last so many seconds.
const WINDOW: Duration = Duration::from_secs(10);

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Live bars.
    Bars,
    /// A line every ten seconds and at each new phase.
    Lines,
    /// A JSON line every second.
    Json,
    /// Notices only.
    Off,
}

impl Style {
    /// How long this style is silent at most.
    fn interval(self) -> Duration {
        match self {
            Self::Bars => SAMPLE,
            Self::Json => Duration::from_secs(1),
            Self::Lines => Duration::from_secs(10),
            Self::Off => Duration::MAX,
        }
    }
}

/// Runs `work` to its end and shows what `control` counts meanwhile.
pub(crate) async fn watch<T>(
    control: &Control,
    (output, style): (Output, Style),
    work: impl Future<Output = T>,
) -> T {
    let mut view = View::new(output, style);
    let mut timer = tokio::time::interval(SAMPLE);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            result = &mut work => {
                view.finish(control);
                return result;
            }
            _ = timer.tick() => view.update(control),
        }
    }
}

struct View {
    output: Output,
    style: Style,
    bars: MultiProgress,
    disks: Vec<ProgressBar>,
    notices_shown: usize,
    phase: String,
    last: Instant,
    rate: Rate,
}

impl View {
    fn new(output: Output, style: Style) -> Self {
        let target = match style {
            Style::Bars => ProgressDrawTarget::stderr_with_hz(10),
            _ => ProgressDrawTarget::hidden(),
        };
        Self {
            output,
            style,
            bars: MultiProgress::with_draw_target(target),
            disks: Vec::new(),
            notices_shown: 0,
            phase: String::new(),
            last: Instant::now(),
            rate: Rate::default(),
        }
    }

    fn update(&mut self, control: &Control) {
        self.notices(control);
        let now = Instant::now();
        let disks = control.disks();
        let total = Total::of(&disks);
        self.rate.sample(now, total.done_bytes);
        let phase = control.phase();
        let new_phase = phase != self.phase;
        if !new_phase && now.duration_since(self.last) < self.style.interval() {
            return;
        }
        self.last = now;
        self.phase = phase;
        match self.style {
            Style::Off => {}
            Style::Bars => self.draw(&disks),
            Style::Json => self.json(&disks, total),
            Style::Lines => self.text(total),
        }
    }

    fn draw(&mut self, disks: &[std::sync::Arc<DiskProgress>]) {
        for disk in &disks[self.disks.len()..] {
            let style = ProgressStyle::with_template(
                "{prefix:12} {wide_bar} {bytes:>11} / {total_bytes:11} {binary_bytes_per_sec:>13} {eta:>5} left",
            )
            .expect("the template is valid");
            let bar = ProgressBar::new(disk.total_bytes).with_style(style);
            let bar = self.bars.add(bar.with_prefix(shown(&disk.name).into_owned()));
            self.disks.push(bar);
        }
        for (bar, disk) in self.disks.iter().zip(disks) {
            bar.set_position(disk.done_bytes());
        }
    }

    fn json(&self, disks: &[std::sync::Arc<DiskProgress>], total: Total) {
        if self.phase.is_empty() {
            return;
        }
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| {
                json!({
                    "name": disk.name,
                    "total_bytes": disk.total_bytes,
                    "done_bytes": disk.done_bytes(),
                    "read_bytes": disk.read_bytes(),
                })
            })
            .collect();
        line(&json!({
            "type": "progress",
            "phase": self.phase,
            "disks": disks,
            "bytes_per_second": self.rate.per_second(),
            "seconds_left": self.rate.seconds_left(total),
        }));
    }

    fn text(&self, total: Total) {
        if self.phase.is_empty() {
            return;
        }
        let mut text = self.phase.clone();
        if let Some(rate) = self.rate.per_second() {
            let percent = u128::from(total.done_bytes) * 100 / u128::from(total.bytes.max(1));
            let _ =
                write!(text, ": {percent} % of {}, {}/s", ByteSize(total.bytes), ByteSize(rate));
            if let Some(seconds) = self.rate.seconds_left(total) {
                let _ = write!(text, ", {seconds} s left");
            }
        }
        say(&shown(&text));
    }

    fn notices(&mut self, control: &Control) {
        for notice in control.notices_from(self.notices_shown) {
            self.notices_shown += 1;
            self.bars.suspend(|| self.output.notice(&notice));
        }
    }

    fn finish(&mut self, control: &Control) {
        for bar in &self.disks {
            bar.finish_and_clear();
        }
        self.notices(control);
    }
}

#[derive(Clone, Copy)]
struct Total {
    bytes: u64,
    done_bytes: u64,
}

impl Total {
    fn of(disks: &[std::sync::Arc<DiskProgress>]) -> Self {
        Self {
            bytes: disks.iter().map(|disk| disk.total_bytes).sum(),
            done_bytes: disks.iter().map(|disk| disk.done_bytes()).sum(),
        }
    }
}

/// The speed of late, from samples no older than [`WINDOW`].
#[derive(Default)]
struct Rate {
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn sample(&mut self, now: Instant, done_bytes: u64) {
        self.samples.push_back((now, done_bytes));
        while self.samples.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            self.samples.pop_front();
        }
    }

    /// Bytes per second, once something was done over a second or so.
    fn per_second(&self) -> Option<u64> {
        let ((start, first), (end, last)) = (self.samples.front()?, self.samples.back()?);
        let ms = u64::try_from(end.duration_since(*start).as_millis()).ok()?;
        let bytes = last.saturating_sub(*first);
        (ms >= 500 && bytes > 0).then(|| bytes.saturating_mul(1000) / ms)
    }

    fn seconds_left(&self, total: Total) -> Option<u64> {
        let rate = self.per_second().filter(|rate| *rate > 0)?;
        Some(total.bytes.saturating_sub(total.done_bytes).div_ceil(rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        rate.sample(at(0), 0);
        assert_eq!(rate.per_second(), None);
        rate.sample(at(1), 1000);
        assert_eq!(rate.per_second(), Some(1000));
        rate.sample(at(20), 1000);
        rate.sample(at(30), 21_000);
        assert_eq!(rate.per_second(), Some(2000), "the slow start is forgotten");
        let total = Total { bytes: 31_000, done_bytes: 21_000 };
        assert_eq!(rate.seconds_left(total), Some(5));
    }
}
