//! `logits`: what the model says about given token ids, in a file that others can compare with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use burn::tensor::{Int, Tensor, TensorData};
use checkpoint::DType;
use infer::CHUNK;
use model::{Cache, ForwardContext};

use crate::console::Console;
use crate::open::{CacheName, ComputeName, ModelArgs, Opened};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// JSON file with rows of token ids of equal length: `{"input_ids": [[…], …]}`.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) ids: PathBuf,
    /// File to write: `logits`, F32, `[batch, seq, vocab]`.
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
    /// What products with weights in ggml's blocks round activations to.
    #[arg(long, value_enum, default_value_t = ComputeName::F32)]
    pub(crate) compute: ComputeName,
    /// Read every row as generation does: 512 ids at a time, through a cache that holds what attention reads of earlier ones
    /// in this form. By default a row is read at once, without a cache.
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) cache: Option<CacheName>,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let rows = data::read_ids(&args.ids)?;
    let opened = args.model.open(console)?;
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

/// Logits of one row, `[seq, vocab]`. Rows go one by one, so that no more than one is held besides the result.
fn row_logits(opened: &Opened, row: &[u32], args: &Args) -> Vec<f32> {
    let (model, compute) = (&opened.model, args.compute.compute());
    let of_piece = |piece: &[u32], mut ctx: ForwardContext<'_>| -> Vec<f32> {
        let (seq, hidden_size) = (piece.len(), model.config.hidden_size);
        let ids: Vec<i32> = piece.iter().map(|id| *id as i32).collect(); // Below the vocabulary's size.
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, seq]), &opened.device);
        let hidden = model.hidden(ids, &mut ctx);
        let logits = model.logits(hidden.reshape([seq, hidden_size]), &ctx);
        logits.into_data().try_to_vec().expect("logits are f32")
    };
    let Some(cache) = args.cache else {
        return of_piece(row, ForwardContext::new(compute));
    };
    let mut cache = Cache::new(&model.config, cache.cache_type());
    let pieces = row.chunks(CHUNK);
    pieces
        .flat_map(|piece| of_piece(piece, ForwardContext::cached(compute, [&mut cache])))
        .collect()
}
