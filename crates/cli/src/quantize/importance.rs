//! `quantize --imatrix-data`, `--imatrix`: the importance matrix of a model.

use std::path::PathBuf;

use ::model::export::importance::Importance;
use anyhow::bail;
use checkpoint::Folder;
use data::{Columns, SplitName};

use crate::console::Console;
use crate::device::cpu;
use crate::open::open_model;
use crate::rows::SplitRows;

/// Maximum length of a calibration sequence, in tokens: all inputs of a mixture layer are held together.
const MAX_CALIBRATION_LENGTH: usize = 512;

#[derive(Debug, clap::Args)]
pub(crate) struct ImportanceArgs {
    /// Calibration data for an importance matrix: folder with a training split (`train.jsonl`, `.csv`,
    /// `.parquet`, …), or a file of rows.
    ///
    /// The squared inputs of every weight column are measured, expert by expert. Quantization then rounds the columns
    /// with the largest inputs most precisely.
    #[arg(long, value_name = "PATH")]
    imatrix_data: Option<PathBuf>,
    /// Maximum number of calibration samples.
    #[arg(long, value_name = "N", default_value_t = 128)]
    imatrix_samples: usize,
    /// Importance matrix: GGUF file written by llama.cpp's `llama-imatrix`.
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix_data")]
    imatrix: Option<PathBuf>,
}

impl ImportanceArgs {
    /// Whether there is an importance matrix.
    pub(super) fn is_given(&self) -> bool {
        self.imatrix_data.is_some() || self.imatrix.is_some()
    }

    /// Measures or reads the importance matrix, and notes how many tokens it is from.
    pub(super) fn importance(
        &self,
        model: &str,
        folder: &Folder,
        columns: &Columns,
        console: &Console,
    ) -> anyhow::Result<Option<Importance>> {
        let importance = match (&self.imatrix, &self.imatrix_data) {
            (Some(file), _) => Importance::read(file)?,
            (None, Some(data)) => {
                let rows = SplitRows {
                    path: data,
                    split: SplitName::Train,
                    columns,
                    console,
                };
                self.measure(rows, model, folder)?
            }
            (None, None) => return Ok(None),
        };
        let experts = match (importance.rare_experts, importance.experts) {
            (_, 0) => String::new(),
            (0, of) => format!("; all {of} experts received enough of them"),
            (rare, of) => {
                format!(
                    "; {rare} of {of} experts received too few, and are averaged with their layer"
                )
            }
        };
        console.note(format_args!(
            "importance matrix from {} tokens{experts}",
            importance.tokens
        ));
        Ok(Some(importance))
    }

    fn measure(
        &self,
        rows: SplitRows<'_>,
        model: &str,
        folder: &Folder,
    ) -> anyhow::Result<Importance> {
        let console = rows.console;
        let opened = open_model(model, None, &cpu(), console)?;
        let config = &opened.model.config;
        let length = MAX_CALIBRATION_LENGTH.min(config.max_position_embeddings);
        let tokenizer = opened.tokenizer.as_deref();
        let split = rows.read(tokenizer, length, config.vocab_size)?;
        let samples = split.samples.iter().take(self.imatrix_samples);
        let rows: Vec<&[u32]> = samples.map(|sample| sample.ids.as_slice()).collect();
        if rows.is_empty() {
            bail!("`--imatrix-samples`: expected at least 1, found 0");
        }
        let mut progress = console.progress(rows.len() as u64, "samples");
        let measured = Importance::measure(folder, &opened.model, &rows, &mut |done| {
            progress.update(done as u64, "");
        });
        progress.finish();
        Ok(measured?)
    }
}
