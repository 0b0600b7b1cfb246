//! A plan: what takes memory, how that compares with a limit, and what makes it smaller.

use serde_json::{Value, json};

use super::knobs::Knob;
use super::lines::{GIB, PlanLine, size};
use crate::host::machine::{GpuShare, Machine, MemoryLimit};

/// A plan for people and programs.
pub(crate) struct Plan {
    /// What is planned.
    pub(super) title: String,
    /// Weights that are read as they are stored, by format.
    pub(super) mapped: Vec<PlanLine>,
    /// The program's own memory, adding up.
    pub(super) own: Vec<PlanLine>,
    /// Parts of the above, and what they would be otherwise.
    pub(super) details: Vec<PlanLine>,
    /// Settings that would make it smaller.
    pub(super) knobs: Vec<Knob>,
    /// Settings that make it fit together, and how much they need.
    pub(super) proposal: Option<(String, f64)>,
    /// Of the weights, those that need not be in memory: a token reads one row of an embedding.
    pub(super) by_row: f64,
    /// Tokens per second, if a bandwidth is given.
    pub(super) tokens_per_second: Option<f64>,
    /// What is read from disk, if not all weights stay in memory.
    pub(super) disk: Option<DiskReads>,
}

/// What a plan is compared with.
pub(super) struct PlanTarget {
    pub(super) limit: Option<MemoryLimit>,
    /// The share of the limit that is taken for a model that generates.
    pub(super) share: f64,
    /// Whether weights may stay on disk. A GPU holds all.
    pub(super) has_disk: bool,
    /// Bytes per second of memory, if it is said.
    pub(super) bandwidth: Option<f64>,
    /// Bytes per second of the disk.
    pub(super) disk_bandwidth: f64,
}

impl PlanTarget {
    /// What a model that generates may take of the limit.
    pub(super) fn usable(&self) -> Option<MemoryLimit> {
        self.limit.as_ref().map(|limit| MemoryLimit {
            bytes: (self.share * limit.bytes as f64) as u64,
            source: limit.source.clone(),
        })
    }
}

/// Weights that are read from disk again and again.
pub(super) struct DiskReads {
    /// Bytes that do not stay in memory.
    pub(super) weights: f64,
    /// Bytes that are read for each token, or in each step.
    pub(super) bytes: f64,
    /// What they are read for.
    pub(super) each: ReadFor,
    /// Bytes per second of the disk.
    pub(super) bandwidth: f64,
}

impl DiskReads {
    /// The time that the disk takes.
    pub(super) fn seconds(&self) -> f64 {
        self.bytes / self.bandwidth
    }

    fn text(&self) -> String {
        let seconds = self.seconds();
        let (each, speed) = match self.each {
            ReadFor::Token => ("token", format!("at most {:.2} tokens/s", 1.0 / seconds)),
            ReadFor::Step => ("step", format!("{seconds:.1} s")),
        };
        format!(
            "{} of the weights on disk, of which about {} are read for each {}: {speed} at {} GB/s",
            size(self.weights),
            size(self.bytes),
            each,
            self.bandwidth / 1e9
        )
    }
}

/// What weights are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadFor {
    /// A token of a model that generates.
    Token,
    /// A step of training.
    Step,
}

impl Plan {
    fn own(&self) -> f64 {
        self.own.iter().map(|line| line.bytes).sum()
    }

    fn mapped(&self) -> f64 {
        self.mapped.iter().map(|line| line.bytes).sum()
    }

    /// All but what need not be in memory.
    fn needed(&self) -> f64 {
        self.own() + self.mapped() - self.by_row
    }

    /// How it compares with a limit.
    fn verdict(&self, limit: &MemoryLimit) -> String {
        let bytes = limit.bytes as f64;
        let all = self.needed();
        let of = format!("{} ({})", size(bytes), limit.source);
        match &self.disk {
            Some(disk) if all <= bytes => format!(
                "runs in {of} with {}; `--memory-budget {:.1}` keeps all in memory",
                disk.text(),
                (all / GIB * 10.0).ceil() / 10.0
            ),
            Some(disk) => format!("runs in {of} with {}", disk.text()),
            None if all <= bytes => format!("fits {of}, with {} left", size(bytes - all)),
            None => format!("does not fit {of}: {} more is needed", size(all - bytes)),
        }
    }

    pub(super) fn text(&self, limit: Option<&MemoryLimit>, machine: &Machine) -> String {
        let mut lines = vec![self.title.clone(), String::new()];
        let row = |line: &PlanLine| {
            let note = if line.note.is_empty() {
                String::new()
            } else {
                format!("  {}", line.note)
            };
            format!("{:<44}{:>10}{note}", line.what, size(line.bytes))
        };
        lines.extend(self.mapped.iter().map(row));
        // Less than half a MiB is no line.
        let own = self
            .own
            .iter()
            .filter(|line| line.bytes >= f64::from(1 << 19));
        lines.extend(own.map(row));
        let total = |what: &str, bytes: f64| format!("{what:<44}{:>10}", size(bytes));
        if !self.mapped.is_empty() {
            lines.push(total("mapped, in all", self.mapped()));
            lines.push(total("the program's own, at most", self.own()));
        }
        lines.push(total("together", self.own() + self.mapped()));
        if !self.details.is_empty() {
            lines.push(String::new());
            lines.extend(self.details.iter().map(row));
        }
        if let Some(speed) = self.tokens_per_second {
            lines.push(format!("\nat this bandwidth at most {speed:.1} tokens/s"));
        }
        lines.push(String::new());
        lines.push(match limit {
            Some(limit) => self.verdict(limit),
            None => "this machine does not say how much memory is free; give a limit with --memory-budget".into(),
        });
        if let Some((settings, own)) = &self.proposal {
            lines.push(format!("fits with {settings}: {}", size(*own)));
        }
        if !self.knobs.is_empty() {
            lines.push("\nwhat makes it smaller:".into());
            lines.extend(self.knobs.iter().map(|knob| format!("  {knob}")));
        }
        if let Some(share) = machine.gpu_share() {
            lines.push(gpu_note(share));
        }
        lines.join("\n")
    }

    pub(super) fn to_json(&self, limit: Option<&MemoryLimit>) -> Value {
        let lines = |lines: &[PlanLine]| -> Value {
            let lines = lines
                .iter()
                .map(|line| (line.what.clone(), line.bytes.round().into()));
            Value::Object(lines.collect())
        };
        let is_within = limit.map(|limit| self.needed() <= limit.bytes as f64);
        json!({
            "subject": self.title,
            "mapped": lines(&self.mapped),
            "own": lines(&self.own),
            "details": lines(&self.details),
            "mapped_bytes": self.mapped().round(),
            "own_bytes": self.own().round(),
            "limit_bytes": limit.map(|limit| limit.bytes),
            "limit": limit.map(|limit| &limit.source),
            "fits": is_within.map(|is_within| is_within && self.disk.is_none()),
            "runs": is_within.map(|is_within| is_within || self.disk.is_some()),
            "disk_bytes": self.disk.as_ref().map(|disk| disk.bytes.round()),
            "disk_seconds": self.disk.as_ref().map(DiskReads::seconds),
            "knobs": self.knobs.iter().map(Knob::to_json).collect::<Vec<_>>(),
            "proposal": self.proposal.as_ref().map(|(settings, _)| settings),
            "tokens_per_second": self.tokens_per_second,
        })
    }
}

/// How a Mac's GPU gets more of the memory.
fn gpu_note(share: GpuShare) -> String {
    let (bytes, all) = (size(share.bytes as f64), size(share.of_bytes as f64));
    let by = if share.is_set {
        "as it was set"
    } else {
        "by default, or more on newer systems"
    };
    // Eight GiB, or an eighth of a small machine, stay for the system.
    let more = share.of_bytes - (8 << 30).min(share.of_bytes / 8);
    if share.bytes >= more {
        return format!("\nthe GPU may hold {bytes} of {all}, {by}");
    }
    format!(
        "\nthe GPU may hold {bytes} of {all}, {by}; `sudo sysctl iogpu.wired_limit_mb={}` raises it to {} until the next start",
        more >> 20,
        size(more as f64)
    )
}
