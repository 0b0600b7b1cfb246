//! The memory of a model's weights while it generates: all in memory, or, if a mixture is larger, partly on disk.

use ::train::PROGRAM;
use infer::Engine;
use model::footprint::WeightBytes;
use model::{Compute, ExpertTraffic};
use serde_json::{Value, json};

use crate::console::Console;
use crate::host::machine::MemoryLimit;
use crate::plan::budget::{BudgetArgs, refusal, too_large};
use crate::plan::generation_need::GenerationNeed;
use crate::plan::lines::{sequences, size};
use crate::plan::placement::WeightPlacement;
use crate::values::CacheValue;

// Memory of weights.
#[derive(Debug, Default, Clone, Copy, clap::Args)]
pub(crate) struct MemoryArgs {
    #[command(flatten)]
    pub(crate) budget: BudgetArgs,
    /// Number of experts to prefetch from disk per layer, by predicted routing; 0 turns prefetching off. Default: half
    /// the experts that a token uses.
    #[arg(long, value_name = "N", alias = "read-ahead")]
    pub(crate) prefetch_experts: Option<usize>,
}

/// The sequences that an engine will generate at a time, and the tokens of each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GenerationExtent {
    pub(crate) sequences: usize,
    pub(crate) context: usize,
}

impl MemoryArgs {
    /// The options on the command line.
    pub(crate) fn words(self) -> Vec<String> {
        let prefetch = self.prefetch_experts;
        let prefetch = prefetch.map(|n| ["--prefetch-experts".to_owned(), n.to_string()]);
        let budget = self.budget.words().into_iter();
        budget.chain(prefetch.into_iter().flatten()).collect()
    }

    /// Plans the memory of an engine's weights: what caches and passes leave of the budget, or of free memory. If it holds
    /// them all, all are repacked in memory. Else the weights that every token needs are, and recently used experts are cached.
    /// If even those do not fit, as many weights are repacked as do.
    ///
    /// # Errors
    /// If caches and passes alone need more than there is.
    pub(crate) fn place(
        self,
        engine: &mut Engine,
        extent: GenerationExtent,
        console: &Console,
    ) -> anyhow::Result<()> {
        let Some(limit) = self.budget.limit() else {
            self.keep_all(engine);
            return Ok(());
        };
        let others = bytes_besides_weights(engine, extent, &limit)?;
        let room = (self.budget.share() * limit.bytes as f64 - others).max(0.0);
        let (common, experts) = (engine.common_bytes() as f64, engine.expert_bytes() as f64);
        let what_exceeds = || {
            let [needed, found] = [common + experts, room].map(size);
            format!("weights of {needed} exceed the memory left for them, {found}")
        };
        match WeightPlacement::of(common, experts, room) {
            WeightPlacement::Memory => self.keep_all(engine),
            WeightPlacement::ExpertsOnDisk { cache } => {
                engine.cache_experts(cache as usize, self.prefetch_experts);
                console.note(format_args!(
                    "{}: recently used experts are cached ({}), others are read from disk",
                    what_exceeds(),
                    size(cache)
                ));
            }
            WeightPlacement::Disk { held } => {
                if engine.compute != Compute::F32 {
                    engine.plan_repack(held as usize);
                }
                console.note(format_args!(
                    "{}: the excess is read from disk for every token, which is slow",
                    what_exceeds()
                ));
            }
        }
        Ok(())
    }

    /// All weights in memory. Products in f32 decode blocks as they are stored.
    fn keep_all(self, engine: &mut Engine) {
        if engine.compute != Compute::F32 {
            engine.plan_repack(usize::MAX);
        }
    }
}

/// What generating takes besides weights.
fn bytes_besides_weights(
    engine: &Engine,
    extent: GenerationExtent,
    limit: &MemoryLimit,
) -> anyhow::Result<f64> {
    let config = &engine.model.config;
    let need = GenerationNeed {
        config,
        weights: &WeightBytes::default(),
        sequences: extent.sequences as u64,
        context: extent.context.min(config.max_position_embeddings) as u64,
        cache: CacheValue::of(engine.cache),
    };
    let others = need.now().total() + PROGRAM;
    if others <= limit.bytes as f64 {
        return Ok(others);
    }
    let what = format!(
        "generating {} of {} tokens",
        sequences(need.sequences),
        need.context
    );
    Err(refusal(too_large(
        &what,
        others,
        limit,
        &need.knobs(Some(limit)),
    )))
}

/// Repacks now what would be repacked between steps.
pub(crate) fn repack(engine: &mut Engine, console: &Console) {
    let mut progress = console.progress(0, "MiB of weights");
    engine.repack_all(&mut |done, total| {
        let [done, total] = [done, total].map(|bytes: usize| bytes as u64 >> 20);
        progress.update_of(done, total);
    });
    progress.finish();
}

/// Statistics of the expert cache, in one line for people.
pub(crate) fn cache_summary(traffic: ExpertTraffic) -> String {
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (chosen, prefetches) = (
        traffic.hits + traffic.misses,
        traffic.prefetched + traffic.wasted_prefetches,
    );
    format!(
        "expert cache: {} of {chosen} hits ({:.1} %), {:.0} MiB cached; {} misses prefetched ({:.1} %), {:.0} MiB read; {} of {prefetches} prefetches wasted ({:.0} MiB)",
        traffic.hits,
        share(traffic.hits, chosen),
        mib(traffic.held_bytes as u64),
        traffic.prefetched,
        share(traffic.prefetched, traffic.misses),
        mib(traffic.read_bytes),
        traffic.wasted_prefetches,
        mib(traffic.wasted_bytes),
    )
}

/// Statistics of the expert cache as JSON.
pub(crate) fn cache_object(traffic: ExpertTraffic) -> Value {
    json!({
        "hits": traffic.hits,
        "misses": traffic.misses,
        "prefetched": traffic.prefetched,
        "wasted_prefetches": traffic.wasted_prefetches,
        "read_bytes": traffic.read_bytes,
        "wasted_bytes": traffic.wasted_bytes,
        "held_bytes": traffic.held_bytes,
    })
}
