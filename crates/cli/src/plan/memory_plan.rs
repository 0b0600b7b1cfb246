//! A plan: what takes memory, how that compares with a limit, and what makes it smaller.

use serde_json::{Value, json};

use super::knobs::Knob;
use super::lines::{PlanLine, size};
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
    /// Tokens per second, if a bandwidth is given.
    pub(super) tokens_per_second: Option<f64>,
}

impl Plan {
    fn own(&self) -> f64 {
        self.own.iter().map(|line| line.bytes).sum()
    }

    fn mapped(&self) -> f64 {
        self.mapped.iter().map(|line| line.bytes).sum()
    }

    /// How it compares with a limit.
    fn verdict(&self, limit: &MemoryLimit) -> String {
        let bytes = limit.bytes as f64;
        let (own, mapped) = (self.own(), self.mapped());
        let of = format!("{} ({})", size(bytes), limit.source);
        if own + mapped <= bytes {
            return format!("fits {of}, with {} left", size(bytes - own - mapped));
        }
        if own <= bytes {
            let rest = own + mapped - bytes;
            return format!(
                "runs in {of}, but {} of the weights do not stay in memory: they are read from disk again and again, which is slow",
                size(rest)
            );
        }
        format!("does not fit {of}: {} more is needed", size(own - bytes))
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
        let fits = limit.map(|limit| self.own() + self.mapped() <= limit.bytes as f64);
        json!({
            "subject": self.title,
            "mapped": lines(&self.mapped),
            "own": lines(&self.own),
            "details": lines(&self.details),
            "mapped_bytes": self.mapped().round(),
            "own_bytes": self.own().round(),
            "limit_bytes": limit.map(|limit| limit.bytes),
            "limit": limit.map(|limit| &limit.source),
            "fits": fits,
            "runs": limit.map(|limit| self.own() <= limit.bytes as f64),
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
        "by default"
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
