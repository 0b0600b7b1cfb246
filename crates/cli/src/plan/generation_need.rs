//! The plan of generating text.

use ::train::PROGRAM;
use infer::{GenerationLoad, GenerationPlan};
use model::footprint::{ModelShape, Trained, WeightBytes};
use model::{CacheType, ModelConfig};

use super::knobs::{Knob, fewer_bits};
use super::lines::{PlanLine, described, format_lines, sequences};
use super::memory_plan::{DiskReads, Plan, PlanTarget, ReadFor};
use super::placement::WeightPlacement;
use crate::host::machine::MemoryLimit;
use crate::values::CacheValue;

/// What is generated, with which model.
pub(crate) struct GenerationNeed<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a WeightBytes,
    pub(crate) sequences: u64,
    /// Tokens of a sequence.
    pub(crate) context: u64,
    pub(crate) cache: CacheValue,
}

impl GenerationNeed<'_> {
    fn of(&self, sequences: u64, context: u64, cache: CacheType) -> GenerationPlan {
        let shape = ModelShape::new(self.config, Trained::Nothing);
        GenerationPlan::new(
            &shape,
            GenerationLoad {
                sequences,
                context,
                cache,
            },
        )
    }

    /// What it takes besides weights.
    pub(crate) fn now(&self) -> GenerationPlan {
        self.of(self.sequences, self.context, self.cache.cache_type())
    }

    /// Bytes that a token of one sequence reads, half of its context into it.
    pub(crate) fn bytes_per_token(&self) -> f64 {
        let cache = self.of(1, self.context, self.cache.cache_type()).cache / 2.0;
        self.weights.per_token(self.config) + cache
    }

    /// What is read from disk because weights have too little room; none if they have enough, or if not even the others have.
    fn disk(&self, target: &PlanTarget) -> Option<DiskReads> {
        let limit = target.limit.as_ref().filter(|_| target.has_disk)?;
        let others = self.now().total() + PROGRAM;
        if others > limit.bytes as f64 {
            return None;
        }
        let usable = target.usable()?.bytes as f64;
        let room = (usable - others).max(0.0);
        let (common, experts) = (self.weights.common(), self.weights.experts);
        let placement = WeightPlacement::of(common, experts, room);
        (placement != WeightPlacement::Memory).then(|| DiskReads {
            weights: common + experts - room,
            bytes: placement.bytes_read(self.weights, self.config),
            each: ReadFor::Token,
            bandwidth: target.disk_bandwidth,
        })
    }

    /// The plan.
    pub(super) fn plan(&self, name: &str, target: &PlanTarget) -> Plan {
        let plan = self.now();
        let disk = self.disk(target);
        let tokens_per_second = target.bandwidth.map(|bandwidth| {
            let from_disk = disk.as_ref().map_or(0.0, |disk| disk.bytes);
            let seconds = disk.as_ref().map_or(0.0, DiskReads::seconds);
            1.0 / (seconds + (self.bytes_per_token() - from_disk) / bandwidth)
        });
        let line = |what: &str, bytes, note| PlanLine {
            what: what.into(),
            bytes,
            note,
        };
        Plan {
            title: format!(
                "{}\n{} of {} tokens, KV cache {}",
                described(name, self.config),
                sequences(self.sequences),
                self.context,
                self.cache.cache_type().name()
            ),
            mapped: Vec::new(),
            own: format_lines(self.weights, "")
                .into_iter()
                .chain([
                    line("KV cache", plan.cache, ""),
                    line("a pass: activations, temporaries", plan.pass, ""),
                    line("scratch of threads", plan.scratch, ""),
                    line("the program", PROGRAM, ""),
                ])
                .collect(),
            details: Vec::new(),
            knobs: self.knobs(target.usable().as_ref()),
            proposal: None,
            by_row: match target.has_disk {
                true => self.weights.embedding,
                false => 0.0,
            },
            tokens_per_second,
            disk,
        }
    }

    /// What makes it smaller.
    pub(crate) fn knobs(&self, limit: Option<&MemoryLimit>) -> Vec<Knob> {
        let now = self.now().total();
        let weights = self.weights.common() + self.weights.experts;
        let of = |change: String, other: GenerationPlan, cost: &str| Knob {
            change,
            saved_bytes: now - other.total(),
            cost: cost.to_owned(),
            fits: limit.map(|limit| weights + other.total() + PROGRAM <= limit.bytes as f64),
        };
        let (sequences, context, cache) = (self.sequences, self.context, self.cache.cache_type());
        let mut knobs = Vec::new();
        if matches!(self.cache, CacheValue::F32) {
            let other = self.of(sequences, context, CacheType::F16);
            knobs.push(of(
                "--cache f16".into(),
                other,
                "cached values with 11 bits",
            ));
        }
        if !matches!(self.cache, CacheValue::Q8_0) {
            let other = self.of(sequences, context, CacheType::Q8_0);
            knobs.push(of(
                "--cache q8_0".into(),
                other,
                "cached values with 8 bits",
            ));
        }
        if sequences > 1 {
            let other = self.of(sequences / 2, context, cache);
            knobs.push(of(
                format!("half as many sequences, {}", sequences / 2),
                other,
                "fewer texts at a time",
            ));
        }
        if context > 512 {
            let other = self.of(sequences, context / 2, cache);
            knobs.push(of(
                format!("half the context, {} tokens", context / 2),
                other,
                "shorter prompts and texts",
            ));
        }
        knobs.retain(|knob| knob.saved_bytes > (now + weights) / 100.0);
        knobs.extend(fewer_bits(self.config, self.weights, now + PROGRAM, limit));
        knobs.sort_by_key(|knob| knob.fits != Some(true));
        knobs
    }
}
