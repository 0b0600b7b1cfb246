//! Generation: the prompt in pieces through the cache, then one token at a time.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use model::{Cache, Compute, Model, Pass, Training, weights};

use crate::error::{Error, Result};
use crate::sampler::{SampleConfig, Sampler};

/// Tokens of a prompt in one pass. Attention scores of a piece are `[heads, CHUNK, kv_seq]`, so that a long prompt
/// costs memory in proportion to its length and not to its square; products of so many rows run at full speed.
const CHUNK: usize = 512;

/// A model that continues prompts.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The model; an adapter, if any, is attached.
    pub model: Model,
    /// Where it computes.
    pub device: Device,
}

/// How a prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Most new tokens.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sample: SampleConfig,
    /// Tokens that end the text; see [`crate::end_of_text_ids`].
    pub stop_ids: Vec<u32>,
    /// What products round their operands to.
    pub compute: Compute,
}

/// What came after a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens, without the one that ended the text.
    pub token_ids: Vec<u32>,
    /// Why there are no more.
    pub stopped: Stop,
    /// Seconds from the start to the choice of the first token.
    pub prefill_secs: f64,
    /// Seconds that the passes after it took, the choice of a token included.
    pub decode_secs: f64,
    /// How many passes those were.
    pub decode_steps: usize,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model chose this token, which ends a text.
    EndOfText(u32),
    /// As many tokens as were asked for.
    MaxTokens,
    /// The caller wanted no more.
    Caller,
}

impl Engine {
    /// A frozen model from its folder, without an adapter.
    ///
    /// # Errors
    /// If the folder cannot be read or holds no model we compute.
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        let model = weights::load(&Folder::open(folder)?, Training::Frozen, &device)?;
        Ok(Self { model, device })
    }

    /// Continues a prompt, and tells each new token as it comes.
    ///
    /// # Errors
    /// If the prompt is empty, holds an id the model does not know, or leaves no room for `max_tokens`; if a setting
    /// of the sampler has no meaning; or if logits are not finite.
    pub fn generate(
        &self,
        prompt: &[u32],
        config: &GenerateConfig,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.check(prompt, config.max_tokens)?;
        let mut sampler = Sampler::new(config.sample)?;
        let mut cache = Cache::new(&self.model.config);
        let mut next = |ids: &[u32], step: usize| {
            let logits = self.last_logits(ids, config.compute, &mut cache);
            sampler.sample(&logits).ok_or(Error::NotFinite { step })
        };
        let mut generation = Generation {
            token_ids: Vec::new(),
            stopped: Stop::MaxTokens,
            prefill_secs: 0.0,
            decode_secs: 0.0,
            decode_steps: 0,
        };
        if config.max_tokens == 0 {
            return Ok(generation);
        }

        let started = Instant::now();
        let mut id = next(prompt, 0)?;
        generation.prefill_secs = started.elapsed().as_secs_f64();
        loop {
            if config.stop_ids.contains(&id) {
                generation.stopped = Stop::EndOfText(id);
                break;
            }
            generation.token_ids.push(id);
            if on_token(id).is_break() {
                generation.stopped = Stop::Caller;
                break;
            }
            if generation.token_ids.len() == config.max_tokens {
                break;
            }
            let started = Instant::now();
            id = next(&[id], generation.token_ids.len())?;
            generation.decode_secs += started.elapsed().as_secs_f64();
            generation.decode_steps += 1;
        }
        Ok(generation)
    }

    fn check(&self, prompt: &[u32], max_tokens: usize) -> Result<()> {
        let (vocab_size, limit) = (
            self.model.config.vocab_size,
            self.model.config.max_position_embeddings,
        );
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(position) = prompt.iter().position(|id| *id as usize >= vocab_size) {
            let id = prompt[position];
            return Err(Error::Vocabulary {
                position,
                id,
                vocab_size,
            });
        }
        if prompt.len().saturating_add(max_tokens) > limit {
            return Err(Error::ContextLength {
                prompt: prompt.len(),
                max_tokens,
                limit,
            });
        }
        Ok(())
    }

    /// Logits after the last of some tokens that continue the cache, `[vocab]`. Waits for the device.
    fn last_logits(&self, ids: &[u32], compute: Compute, cache: &mut Cache) -> Vec<f32> {
        let mut pass = Pass::cached(compute, cache);
        let mut last = None;
        for chunk in ids.chunks(CHUNK) {
            let len = chunk.len();
            let hidden = self.model.hidden(self.tensor(chunk), &mut pass); // [1, len, hidden_size]
            last = Some(hidden.slice([0..1, len - 1..len]));
        }
        let last = last.expect("prompts are checked to have a token, and a step has one");
        let last = last.reshape([1, self.model.config.hidden_size]);
        let logits = self.model.logits(last, &pass).into_data();
        logits.try_to_vec().expect("logits are f32")
    }

    /// # Shapes
    /// - returns: `[1, ids]`
    fn tensor(&self, ids: &[u32]) -> Tensor<2, Int> {
        let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect(); // Below the vocabulary's size, which is checked.
        let shape = [1, ids.len()];
        Tensor::from_data(TensorData::new(ids, shape), &self.device)
    }
}
