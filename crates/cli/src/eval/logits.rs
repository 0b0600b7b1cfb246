//! `logits`: the model's logits for given token ids, in a file that other implementations can be compared with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use burn::tensor::{Int, Tensor, TensorData};
use checkpoint::DType;
use infer::CHUNK;
use model::{Cache, ForwardContext};

use crate::console::Console;
use crate::open::{ModelArgs, Opened, expect_cache, expect_computed};
use crate::values::{COMPUTE_HELP, CacheValue, ComputeValue};

/// Write the logits of token ids to a file, for comparing implementations.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Token ids: JSON file `{"input_ids": [[…], …]}` with rows of equal length.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) ids: PathBuf,
    /// Safetensors file to write, with one tensor `logits`: F32, `[batch, seq, vocab]`.
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
    #[arg(long, value_enum, default_value_t = ComputeValue::F32, help = COMPUTE_HELP)]
    pub(crate) compute: ComputeValue,
    /// KV-cache data type. With it, each row is read through a KV cache, 512 tokens at a time, as `generate` reads a
    /// prompt. Default: no cache; each row is read in one pass.
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) cache: Option<CacheValue>,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    checkpoint::expect_absent(&args.out)?;
    let rows = data::read_ids(&args.ids)?;
    let opened = args.model.open(console)?;
    expect_computed(args.compute, &opened.device)?;
    args.cache
        .map_or(Ok(()), |cache| expect_cache(cache, &opened.device))?;
    let config = &opened.model.config;
    check(&rows, args, &opened)?;

    let shape = [rows.len(), rows[0].len(), config.vocab_size];
    let mut bytes = Vec::with_capacity(shape.iter().product::<usize>() * size_of::<f32>());
    let mut progress = console.progress(rows.len() as u64, "rows");
    for (row_idx, row) in rows.iter().enumerate() {
        let logits = row_logits(&opened, row, args);
        bytes.extend(logits.into_iter().flat_map(f32::to_le_bytes));
        progress.update(row_idx as u64 + 1, "");
    }
    progress.finish();
    let tensor = checkpoint::Tensor::new("logits", DType::F32, &shape, bytes.into())?;
    checkpoint::write_safetensors(&args.out, &[tensor], &BTreeMap::new())?;
    console.note(format_args!(
        "{}: logits {shape:?}, F32",
        args.out.display()
    ));
    console.memory();
    Ok(ExitCode::SUCCESS)
}

fn check(rows: &[Vec<u32>], args: &Args, opened: &Opened) -> anyhow::Result<()> {
    let (file, config) = (args.ids.display(), &opened.model.config);
    let (vocab_size, limit) = (config.vocab_size, config.max_position_embeddings);
    for (row_idx, row) in rows.iter().enumerate() {
        if let Some(id) = row.iter().find(|id| **id as usize >= vocab_size) {
            bail!(
                "{file}: `input_ids[{row_idx}]`: expected ids below the vocabulary size {vocab_size}, found {id}"
            );
        }
        if row.len() > limit {
            let found = row.len();
            bail!(
                "{file}: `input_ids[{row_idx}]`: expected at most the model's {limit} positions, found {found} ids"
            );
        }
    }
    Ok(())
}

/// Logits of one row, `[seq, vocab]`. Rows are computed one by one, so that only one is held besides the result.
fn row_logits(opened: &Opened, row: &[u32], args: &Args) -> Vec<f32> {
    let (model, compute) = (&opened.model, args.compute.quant());
    let of_chunk = |chunk: &[u32], mut ctx: ForwardContext<'_>| -> Vec<f32> {
        let (seq, hidden_size) = (chunk.len(), model.config.hidden_size);
        let ids: Vec<i32> = chunk.iter().map(|id| *id as i32).collect(); // Below the vocabulary's size.
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, seq]), &opened.device);
        let hidden = model.hidden(ids, &mut ctx);
        infer::read_logits(model, hidden.reshape([seq, hidden_size]), &ctx)
    };
    let Some(cache) = args.cache else {
        return of_chunk(row, ForwardContext::new(compute));
    };
    let mut cache = Cache::new(&model.config, cache.cache_type());
    let chunks = row.chunks(CHUNK);
    chunks
        .flat_map(|chunk| of_chunk(chunk, ForwardContext::cached(compute, [&mut cache])))
        .collect()
}
