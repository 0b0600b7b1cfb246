//! The plan of generating text.

use ::train::PROGRAM;
use infer::{GenerationLoad, GenerationPlan};
use model::footprint::{BytesByFormat, ModelShape, StoredAs, Trained, stored_bytes, token_bytes};
use model::{CacheType, ModelConfig};

use super::knobs::Knob;
use super::lines::{PlanLine, described, format_lines, parameters, sequences, speed};
use super::memory_plan::Plan;
use crate::host::machine::MemoryLimit;
use crate::values::{CacheValue, OutputFormat};

/// What is generated, with which model.
pub(crate) struct GenerationNeed<'a> {
    pub(crate) config: &'a ModelConfig,
    /// Bytes of the weights by format.
    pub(crate) weights: &'a BytesByFormat,
    /// How they are stored, if that is a choice.
    pub(crate) stored: Option<&'a StoredAs>,
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

    fn weight_bytes(&self) -> f64 {
        self.weights.values().sum()
    }

    /// Bytes that a token of one sequence reads, half of its context into it.
    pub(crate) fn bytes_per_token(&self) -> f64 {
        let cache = self.of(1, self.context, self.cache.cache_type()).cache / 2.0;
        let weights = match self.stored {
            Some(stored) => token_bytes(self.config, stored),
            None => {
                let counts = parameters(self.config);
                self.weight_bytes() * counts.active as f64 / counts.total as f64
            }
        };
        weights + cache
    }

    /// The plan.
    pub(crate) fn plan(
        &self,
        name: &str,
        limit: Option<&MemoryLimit>,
        bandwidth: Option<f64>,
    ) -> Plan {
        let plan = self.now();
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
            knobs: self.knobs(limit),
            proposal: None,
            tokens_per_second: bandwidth.map(|bandwidth| speed(bandwidth, self.bytes_per_token())),
        }
    }

    /// What makes it smaller.
    pub(crate) fn knobs(&self, limit: Option<&MemoryLimit>) -> Vec<Knob> {
        let now = self.now().total();
        let weights = self.weight_bytes();
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
        knobs.extend(self.fewer_bits(limit));
        knobs.sort_by_key(|knob| knob.fits != Some(true));
        knobs
    }

    /// Weights in 4 bits, if they have more.
    fn fewer_bits(&self, limit: Option<&MemoryLimit>) -> Option<Knob> {
        let scheme = "gguf:q4_k_m";
        let stored = match OutputFormat::parse(scheme).ok()? {
            OutputFormat::Gguf(scheme) => {
                StoredAs::Gguf(model::export::mix::Mix::new(scheme, "").ok()?)
            }
            OutputFormat::Folder(_) => return None,
        };
        let other: f64 = stored_bytes(self.config, &stored).values().sum();
        let saved_bytes = self.weight_bytes() - other;
        (saved_bytes > self.weight_bytes() / 10.0).then(|| Knob {
            change: format!("quantize --to {scheme}"),
            saved_bytes,
            cost: "weights with 4 to 6 bits; `quantize --data` shows what it costs".into(),
            fits: limit.map(|limit| other + self.now().total() + PROGRAM <= limit.bytes as f64),
        })
    }
}
