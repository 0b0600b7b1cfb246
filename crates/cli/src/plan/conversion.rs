//! The memory of writing a model in another form, and of measuring one.

use ::train::PROGRAM;
use checkpoint::Folder;
use model::ModelConfig;
use model::footprint::{ModelShape, Trained};

use super::budget::{BudgetArgs, refusal, too_large};
use super::knobs::Knob;
use crate::values::OutputFormat;

/// Copies of the largest tensor in f32 while a folder is written: its values, and what is written.
const COPIES: f64 = 2.0;
/// What is made of a GGUF at a time: rows for all threads.
const ROWS_OF_GGUF: f64 = 16.0 * (1 << 20) as f64;

/// Refuses to write a model if there is too little memory for its largest tensor. Without a format, it keeps its own.
pub(crate) fn expect_room_for_tensors(
    folder: &Folder,
    format: Option<OutputFormat>,
    budget: BudgetArgs,
) -> anyhow::Result<()> {
    let Some(limit) = budget.limit() else {
        return Ok(());
    };
    let mut largest = 0.0_f64;
    for name in folder.names() {
        let shape = &folder.stored(name)?.shape;
        largest = largest.max(shape.iter().map(|n| *n as f64).product());
    }
    let own = match format {
        Some(OutputFormat::Gguf(_)) => PROGRAM + ROWS_OF_GGUF,
        Some(OutputFormat::Folder(_)) | None => PROGRAM + COPIES * 4.0 * largest,
    };
    if own <= limit.bytes as f64 {
        return Ok(());
    }
    Err(refusal(too_large(
        "writing the largest tensor",
        own,
        &limit,
        &[],
    )))
}

/// Refuses to measure losses of whole sequences if there is too little memory for a batch of the longest.
pub(crate) fn expect_room_for_losses(
    config: &ModelConfig,
    (rows, seq): (u64, usize),
    budget: BudgetArgs,
) -> anyhow::Result<()> {
    let Some(limit) = budget.limit() else {
        return Ok(());
    };
    let shape = ModelShape::new(config, Trained::Nothing);
    let threads = kernels::n_threads() as f64;
    let own = |rows: u64, seq: usize| {
        let (rows, seq) = (rows as f64, seq as f64);
        PROGRAM + shape.loss_pass(rows, seq) + shape.scratch(rows * seq, threads)
    };
    let (needed, bytes) = (own(rows, seq), limit.bytes as f64);
    if needed <= bytes {
        return Ok(());
    }
    let knob = |change: String, other: f64, cost: &str| Knob {
        change,
        saved_bytes: needed - other,
        cost: cost.into(),
        fits: Some(other <= bytes),
    };
    let mut knobs = Vec::new();
    if rows > 1 {
        let cost = "the same numbers, a little slower";
        knobs.push(knob("--batch 1".into(), own(1, seq), cost));
    }
    let shorter = seq / 2;
    knobs.push(knob(
        format!("--max-length {shorter}"),
        own(rows, shorter),
        "longer rows are cut off there",
    ));
    let what = format!("measuring {rows} sequences of {seq} tokens");
    Err(refusal(too_large(&what, needed, &limit, &knobs)))
}
