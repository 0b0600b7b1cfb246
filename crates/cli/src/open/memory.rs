//! The memory of a model's weights while it generates: all in memory, or, if a mixture is larger, partly on disk.

use infer::Engine;
use model::{Compute, ExpertTraffic};
use serde_json::{Value, json};

use crate::console::Console;
use crate::host;

// Memory of weights.
#[derive(Debug, Default, Clone, Copy, clap::Args)]
pub(crate) struct MemoryArgs {
    /// Memory budget for weights, in GiB. If the weights need more, experts are read from disk, and recently used
    /// experts are cached. Default: three quarters of free memory.
    #[arg(long, value_name = "GIB", value_parser = gib)]
    pub(crate) memory_budget: Option<u64>,
    /// Number of experts to prefetch from disk per layer, by predicted routing; 0 turns prefetching off. Default: half
    /// the experts that a token uses.
    #[arg(long, value_name = "N", alias = "read-ahead")]
    pub(crate) prefetch_experts: Option<usize>,
}

/// About the memory of a program with a small model, besides weights. It counts if the page cache gets the rest.
const PROGRAM: usize = 64 << 20;

const GIB: f64 = (1_u64 << 30) as f64;

/// Bytes from GiB.
fn gib(text: &str) -> Result<u64, String> {
    let gib: f64 = text
        .parse()
        .map_err(|_| format!("expected a number, found `{text}`"))?;
    let bytes = gib * GIB;
    if bytes >= 1.0 && bytes < 2f64.powi(60) {
        return Ok(bytes as u64);
    }
    Err(format!("expected a number of GiB above 0, found {text}"))
}

impl MemoryArgs {
    /// The options on the command line.
    pub(crate) fn words(self) -> Vec<String> {
        let budget = self.memory_budget.map(|bytes| bytes as f64 / GIB);
        let words = |name: &str, value: Option<String>| {
            let words = value.map(|value| [name.to_owned(), value]);
            words.into_iter().flatten()
        };
        words("--memory-budget", budget.map(|gib| gib.to_string()))
            .chain(words(
                "--prefetch-experts",
                self.prefetch_experts.map(|n| n.to_string()),
            ))
            .collect()
    }

    /// Plans the memory of an engine's weights. If the budget, or three quarters of free memory, holds them all, all
    /// are repacked in memory. Else the weights that every token needs are, and recently used experts are cached. If
    /// even those do not fit, as many weights are repacked as do.
    pub(crate) fn place(self, engine: &mut Engine, console: &Console) {
        let free = host::read().available_bytes.unwrap_or(u64::MAX);
        let free = usize::try_from(free).unwrap_or(usize::MAX);
        // The rest is for KV caches and other programs.
        let budget = self.memory_budget.map_or(free / 4 * 3, |bytes| {
            usize::try_from(bytes).unwrap_or(usize::MAX)
        });
        let (bytes, common) = (engine.size_bytes(), engine.common_bytes());
        let in_gib = |bytes: usize| bytes as f64 / GIB;
        let warn = |wanted: usize| {
            if wanted > free {
                console.note(format_args!(
                    "weights need {:.2} GiB of memory, but only {:.2} GiB are free: the system may kill this program",
                    in_gib(wanted),
                    in_gib(free)
                ));
            }
        };
        if bytes <= budget {
            // Products in f32 decode blocks as they are stored.
            if engine.compute != Compute::F32 {
                warn(bytes);
                engine.plan_repack(usize::MAX);
            }
            return;
        }
        let (needed, found) = (in_gib(bytes), in_gib(budget));
        if common >= budget {
            let copied = match self.memory_budget {
                Some(_) => budget,
                None => free.saturating_sub(PROGRAM) / 4 * 3,
            };
            if engine.compute != Compute::F32 {
                warn(copied);
                engine.plan_repack(copied);
            }
            console.note(format_args!(
                "weights of {needed:.2} GiB exceed the memory budget of {found:.2} GiB: the excess is read from disk for every token, which is slow"
            ));
            return;
        }
        warn(budget);
        engine.cache_experts(budget - common, self.prefetch_experts);
        console.note(format_args!(
            "weights of {needed:.2} GiB exceed the memory budget of {found:.2} GiB: recently used experts are cached ({:.2} GiB), others are read from disk",
            in_gib(budget - common)
        ));
    }
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
