//! Repacks weights into memory between steps.
//!
//! Products read weights fastest in the layout of [`Matrix::repack`], but repacking a model takes as long as many
//! tokens. So an engine starts with the bytes of the file and repacks some weights between passes, for about as long as
//! a pass takes: the first token comes at once, and passes are soon fast. Products have the same bits before and after.

use std::time::{Duration, Instant};

use kernels::Matrix;
use model::{Compute, Model, Mtp};

/// Bytes repacked at a time, at least: enough for pages of 2 MiB, and too little to delay a token.
pub const REPACKED_AT_ONCE: usize = 16 << 20;

/// Which weights are to be repacked, and how many are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RepackSchedule {
    /// Bytes repacked at a time, at least.
    min_bytes: usize,
    /// Matrices to repack: the first ones that [`EngineWeights::for_each`] visits.
    planned: usize,
    /// Matrices that are repacked.
    done: usize,
    /// Duration of the last pass.
    pub(crate) last_pass: Duration,
}

/// The weights of an engine.
pub(crate) struct EngineWeights<'a> {
    pub(crate) compute: Compute,
    pub(crate) model: &'a mut Model,
    /// They share the weights of `model`.
    pub(crate) adapted_models: &'a mut [Model],
    pub(crate) mtp: Option<&'a mut Mtp>,
}

impl Default for RepackSchedule {
    fn default() -> Self {
        Self {
            min_bytes: REPACKED_AT_ONCE,
            planned: 0,
            done: 0,
            last_pass: Duration::ZERO,
        }
    }
}

impl RepackSchedule {
    /// Plans to repack the first weights that fit a budget in bytes.
    pub(crate) fn plan(&mut self, weights: &mut EngineWeights<'_>, budget: usize) {
        let (mut planned, mut bytes) = (0, 0_usize);
        weights.for_each(&mut |at, matrix| {
            bytes = bytes.saturating_add(matrix.size_bytes());
            if bytes <= budget {
                planned = at + 1;
            }
        });
        self.planned = planned;
    }

    /// Repacks all that is planned. `on_bytes` gets the bytes done and their total.
    pub(crate) fn repack_all(
        &mut self,
        weights: &mut EngineWeights<'_>,
        on_bytes: &mut dyn FnMut(usize, usize),
    ) {
        let (first, planned) = (self.done, self.planned);
        let (mut total, mut bytes) = (0, 0);
        weights.for_each(&mut |at, matrix| {
            if (first..planned).contains(&at) {
                total += matrix.size_bytes();
            }
        });
        while self.done < planned {
            bytes += self.repack_some(weights);
            on_bytes(bytes, total);
        }
    }

    /// Repacks planned weights until `time` has passed, and at least once.
    pub(crate) fn repack_for(&mut self, weights: &mut EngineWeights<'_>, time: Duration) {
        let started = Instant::now();
        while self.done < self.planned {
            self.repack_some(weights);
            if started.elapsed() >= time {
                return;
            }
        }
    }

    /// Repacks some weights; returns their bytes.
    fn repack_some(&mut self, weights: &mut EngineWeights<'_>) -> usize {
        let Self { planned, done, .. } = *self;
        let (mut matrices, mut bytes, min_bytes) = (Vec::new(), 0, self.min_bytes);
        weights.for_each(&mut |at, matrix| {
            if (done..planned).contains(&at) && bytes < min_bytes {
                bytes += matrix.size_bytes();
                matrices.push(matrix.clone());
            }
        });
        let mut copied = Vec::new();
        Matrix::repack(&mut matrices, weights.compute, &mut |stored| {
            copied.push(stored.clone());
        });
        self.done += matrices.len();
        weights.replace(done, &matrices);
        // After all of them: reading a part of a file brings some of its neighbors back.
        let copied = copied.iter();
        copied.for_each(|stored| checkpoint::advise_dontneed(stored.bytes()));
        bytes
    }
}

impl EngineWeights<'_> {
    /// Visits the weights of the model with their numbers, in the order of repacking.
    fn for_each(&mut self, visit: &mut dyn FnMut(usize, &mut Matrix)) {
        for_each(self.model, self.mtp.as_deref_mut(), visit);
    }

    /// Replaces the weights from number `first` on.
    fn replace(&mut self, first: usize, matrices: &[Matrix]) {
        let put = &mut |at: usize, matrix: &mut Matrix| {
            if let Some(repacked) = at.checked_sub(first).and_then(|at| matrices.get(at)) {
                *matrix = repacked.clone();
            }
        };
        for_each(self.model, self.mtp.as_deref_mut(), put);
        for model in &mut *self.adapted_models {
            for_each(model, None, put);
        }
    }
}

/// Visits weights with their numbers, in the order of repacking: first those that every token needs, in the order in
/// which it needs them, so that the file's next bytes are mostly the next to be read; then experts, unless they have a
/// cache; then the drafting module.
fn for_each(model: &mut Model, mtp: Option<&mut Mtp>, visit: &mut dyn FnMut(usize, &mut Matrix)) {
    let mut at = 0;
    let visit = &mut |matrix: &mut Matrix| {
        visit(at, matrix);
        at += 1;
    };
    model.for_each_common(visit);
    if model.expert_traffic().is_none() {
        model.for_each_expert(visit);
    }
    if let Some(mtp) = mtp {
        mtp.for_each_frozen(visit);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;
    use kernels::Format;

    use super::*;
    use crate::{Engine, GenerateConfig, SampleConfig};

    /// A golden model in its stored format, for products in int8.
    fn engine(name: &str) -> Engine {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf");
        Engine::open(&goldens.join(name), Compute::MatchWeight, Device::flex()).unwrap()
    }

    /// How many matrices have interleaved blocks, and how many have blocks.
    fn interleaved_counts(engine: &mut Engine) -> [usize; 2] {
        let mut counts = [0; 2];
        for_each(&mut engine.model, None, &mut |_, matrix| {
            let keys = matrix.split_kv_b().map(|heads| heads.keys(0));
            let format = keys.as_ref().unwrap_or(matrix).format();
            counts[0] += usize::from(matches!(format, Format::Interleaved(_)));
            counts[1] += usize::from(matches!(format, Format::Interleaved(_) | Format::Ggml(_)));
        });
        counts
    }

    #[test]
    fn texts_are_the_same_while_weights_are_repacked() {
        let config = GenerateConfig {
            max_tokens: 24,
            sample: SampleConfig::greedy(),
            stop_ids: Vec::new(),
            logprobs: Some(2),
        };
        for (name, in_blocks) in [
            ("deepseek_v3_q8_0.gguf", true),
            ("llama_q4_1.gguf", true),
            ("deepseek_v2_lite_bf16.gguf", false),
        ] {
            let prompts = [vec![1, 5, 9, 200], vec![7; 3], vec![0, 3]];
            let mut mapped = engine(name);
            let expected = mapped.generate_all(&prompts, &config, 3, &mut |_, _| {});
            let (expected, counts) = (expected.unwrap(), interleaved_counts(&mut mapped));
            assert!(
                counts[0] == 0 && (counts[1] > 4) == in_blocks,
                "{name} {counts:?}"
            );

            let mut repacked = engine(name);
            // First the part that fits the budget, then all.
            let half = repacked.size_bytes() / 2;
            repacked.plan_repack(half);
            repacked.repack_all(&mut |_, _| ());
            let part = repacked.schedule.done;
            assert!(part > 5, "{name}");
            let found = repacked.generate_all(&prompts, &config, 3, &mut |_, _| {});
            assert_eq!(found.unwrap()[1].logprobs, expected[1].logprobs, "{name}");
            assert_eq!(repacked.schedule.done, part, "{name}");
            repacked.plan_repack(usize::MAX);
            repacked.schedule.min_bytes = 1;
            let found = repacked.generate_all(&prompts, &config, 3, &mut |_, _| {});
            for (found, expected) in found.unwrap().iter().zip(&expected) {
                assert_eq!(found.token_ids, expected.token_ids, "{name}");
                assert_eq!(found.logprobs, expected.logprobs, "{name}");
            }
            assert!(repacked.schedule.done > part, "{name}");
            repacked.repack_all(&mut |_, _| ());
            assert_eq!(repacked.schedule.done, repacked.schedule.planned, "{name}");
            assert_eq!(interleaved_counts(&mut repacked), [counts[1]; 2], "{name}");
            let again = repacked.generate_all(&prompts, &config, 3, &mut |_, _| {});
            assert_eq!(again.unwrap()[0].logprobs, expected[0].logprobs, "{name}");
        }
    }
}
