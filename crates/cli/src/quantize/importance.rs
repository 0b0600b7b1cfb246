//! `quantize --imatrix-data`, `--imatrix`: what the columns of a model's weights are worth.

use std::path::{Path, PathBuf};

use ::model::export::importance::Importance;
use anyhow::bail;
use checkpoint::Folder;
use data::Split;

use crate::console::Console;
use crate::open::open_model;

/// Longest sequence that inputs are measured on, in tokens: a mixture layer's are held together.
const LONGEST: usize = 512;

#[derive(Debug, clap::Args)]
pub(crate) struct ImportanceArgs {
    /// Of a GGUF: measure what enters every column of the weights, and round those best that most comes through. A folder
    /// with `train.jsonl`, or a file of such rows.
    #[arg(long, value_name = "PATH")]
    imatrix_data: Option<PathBuf>,
    /// Measure on the first so many samples.
    #[arg(long, value_name = "N", default_value_t = 128)]
    imatrix_samples: usize,
    /// Of a GGUF: the same, as a file of llama-imatrix (a GGUF) has it.
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix_data")]
    imatrix: Option<PathBuf>,
}

impl ImportanceArgs {
    /// Whether there is anything to weigh columns by.
    pub(super) fn is_given(&self) -> bool {
        self.imatrix_data.is_some() || self.imatrix.is_some()
    }

    /// Measures or reads it, and says what it rests on.
    pub(super) fn importance(
        &self,
        (name, folder): (&str, &Folder),
        console: &Console,
    ) -> anyhow::Result<Option<Importance>> {
        let importance = match (&self.imatrix, &self.imatrix_data) {
            (Some(file), _) => Importance::read(file)?,
            (None, Some(data)) => self.measure(data, (name, folder), console)?,
            (None, None) => return Ok(None),
        };
        let experts = match (importance.rare_experts, importance.experts) {
            (_, 0) => String::new(),
            (0, of) => format!("; each of {of} experts got enough of them"),
            (rare, of) => format!(
                "; {rare} of {of} experts got too few, and count as a mean with their layer's"
            ),
        };
        console.note(format_args!(
            "importance of columns: from {} tokens{experts}",
            importance.tokens
        ));
        Ok(Some(importance))
    }

    fn measure(
        &self,
        data: &Path,
        (name, folder): (&str, &Folder),
        console: &Console,
    ) -> anyhow::Result<Importance> {
        let opened = open_model(name, None, console)?;
        let config = &opened.model.config;
        let file = match data.is_dir() {
            true => data.join("train.jsonl"),
            false => data.to_owned(),
        };
        let length = LONGEST.min(config.max_position_embeddings);
        let split = Split::open(&file, opened.tokenizer.as_ref(), length, config.vocab_size)?;
        let samples = split.samples.iter().take(self.imatrix_samples);
        let rows: Vec<&[u32]> = samples.map(|sample| sample.ids.as_slice()).collect();
        if rows.is_empty() {
            bail!("`--imatrix-samples`: expected at least 1, found 0");
        }
        let mut progress = console.progress(rows.len() as u64, "samples");
        let measured = Importance::measure(folder, &opened.model, &rows, &mut |done| {
            progress.update(done as u64, "what enters the weights");
        });
        progress.finish();
        Ok(measured?)
    }
}
