//! How tokens are chosen: as the command line says, else as the model's publisher recommends.

use checkpoint::Folder;
use infer::{SampleConfig, recommended_sampling};

use crate::console::Console;
use crate::open::Opened;

// How each token is chosen, and what ends a text.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Sampling temperature; 0 always chooses the most likely token. Default: from generation_config.json if it sets
    /// `do_sample`, else 0.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Top-k sampling: keep the K most likely tokens; 0 keeps all. Default: from generation_config.json if it sets
    /// `do_sample`, else 0.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Top-p (nucleus) sampling: keep the fewest tokens whose total probability reaches P; 1 keeps all. Default: from
    /// generation_config.json if it sets `do_sample`, else 1.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Min-p sampling: keep tokens with at least P times the highest probability; 0 keeps all. Default: from
    /// generation_config.json if it sets `do_sample`, else 0.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Repetition penalty for tokens of the prompt and of the generated text; 1 has no effect. Default: from
    /// generation_config.json, else 1.
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Window of the repetition penalty, in tokens: only the last N count; 0 means all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    repetition_window: usize,
    /// Random seed for sampling.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Stop string: the text ends before it. May be repeated.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Continue generating after an end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    /// The settings of the command line, completed by those of the model's `generation_config.json`.
    ///
    /// # Errors
    /// If a setting of the file is malformed.
    pub(crate) fn config(&self, folder: &Folder) -> anyhow::Result<SampleConfig> {
        let recommended = recommended_sampling(folder)?;
        Ok(SampleConfig {
            temperature: self.temperature.unwrap_or(recommended.temperature),
            top_k: self.top_k.unwrap_or(recommended.top_k),
            top_p: self.top_p.unwrap_or(recommended.top_p),
            min_p: self.min_p.unwrap_or(recommended.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(recommended.repetition_penalty),
            repetition_window: self.repetition_window,
            seed: self.seed,
        })
    }

    /// Tokens that end a text.
    ///
    /// # Errors
    /// If a file of the model names one that is not a token id.
    pub(crate) fn stop_ids(&self, opened: &Opened, console: &Console) -> anyhow::Result<Vec<u32>> {
        if self.ignore_eos {
            return Ok(vec![]);
        }
        let ends = infer::end_of_text(&opened.folder, opened.tokenizer.as_deref())?;
        ends.notes.iter().for_each(|note| console.note(note));
        Ok(ends.ids)
    }
}
