//! Where the weights of a model are while it runs: in memory, or, of a mixture that is larger, partly in its file.

use infer::Engine;
use model::{Compute, ExpertTraffic};
use serde_json::{Value, json};

use crate::console::Console;
use crate::train::memory;

/// How much memory weights take.
#[derive(Debug, Default, Clone, Copy, clap::Args)]
pub(crate) struct MemoryArgs {
    /// Most memory for weights, in GiB; by default three quarters of what is free. Where a model has more, experts stay in
    /// their file, but for those that were used last, or whatever there is no room for.
    #[arg(long, value_name = "GIB", value_parser = gib)]
    pub(crate) memory_budget: Option<u64>,
    /// Experts to prefetch per layer from the predicted routing [default: half of top-k; 0 turns it off]. The text is the
    /// same.
    #[arg(long, value_name = "N", alias = "read-ahead")]
    pub(crate) prefetch_experts: Option<usize>,
}

/// About what a program with a small model needs besides weights, which counts where what is read again and again gets the
/// rest of memory.
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
    /// As they are written on the command line.
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

    /// Says where an engine has its weights: all in memory, if the budget has room for them (or three quarters of what is
    /// free), else those that every token needs and the experts that were used last, or as many as there is room for.
    pub(crate) fn place(self, engine: &mut Engine, console: &Console) {
        let free = memory::read().available_bytes.unwrap_or(u64::MAX);
        let free = usize::try_from(free).unwrap_or(usize::MAX);
        // The rest is for caches and for what else the machine does.
        let room = self.memory_budget.map_or(free / 4 * 3, |bytes| {
            usize::try_from(bytes).unwrap_or(usize::MAX)
        });
        let (bytes, common) = (engine.size_bytes(), engine.common_bytes());
        let in_gib = |bytes: usize| bytes as f64 / GIB;
        let warn = |wanted: usize| {
            if wanted > free {
                console.note(format_args!(
                    "weights would take {:.2} GiB of memory, of which {:.2} GiB are free: the system may end this program",
                    in_gib(wanted),
                    in_gib(free)
                ));
            }
        };
        if bytes <= room {
            // Products in f32 decode blocks as they are stored.
            if engine.compute != Compute::F32 {
                warn(bytes);
                engine.keep_in_memory(usize::MAX);
            }
            return;
        }
        let (needed, found) = (in_gib(bytes), in_gib(room));
        if common >= room {
            let copied = match self.memory_budget {
                Some(_) => room,
                None => free.saturating_sub(PROGRAM) / 4 * 3,
            };
            if engine.compute != Compute::F32 {
                warn(copied);
                engine.keep_in_memory(copied);
            }
            console.note(format_args!(
                "weights of {needed:.2} GiB, room for {found:.2} GiB: what there is no room for is read from its file for every token, which is slow"
            ));
            return;
        }
        warn(room);
        engine.cache_experts(room - common, self.prefetch_experts);
        console.note(format_args!(
            "weights of {needed:.2} GiB, room for {found:.2} GiB: the experts used last stay in memory ({:.2} GiB), others are read from their file",
            in_gib(room - common)
        ));
    }
}

/// Copies at once what would be copied between steps.
pub(crate) fn repack(engine: &mut Engine, console: &Console) {
    let mut progress = console.progress(0, "MiB of weights");
    engine.repack(&mut |done, total| {
        let [done, total] = [done, total].map(|bytes: usize| bytes as u64 >> 20);
        progress.update_of(done, total);
    });
    progress.finish();
}

/// How often experts were in memory.
pub(crate) fn cache_summary(traffic: ExpertTraffic) -> String {
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (chosen, asked) = (
        traffic.hits + traffic.misses,
        traffic.prefetched + traffic.wasted_prefetches,
    );
    format!(
        "experts: {} of {chosen} in memory when chosen ({:.1} %), {:.0} MiB held; of the others {} prefetched ({:.1} %), {:.0} MiB read; {} of {asked} prefetches wasted ({:.0} MiB)",
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

/// The same for programs.
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
