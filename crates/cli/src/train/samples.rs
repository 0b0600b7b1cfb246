//! Samples of a model in training: its continuations of the recipe's prompts.

use std::ops::ControlFlow;

use anyhow::{Context, bail};
use burn::tensor::Device;
use data::{Bos, Special, Tokenizer};
use infer::{Engine, GenerateConfig, SampleConfig};
use model::{Model, OperandRounding};
use train::{Recipe, Session};

use super::end_ids;
use crate::generate::question;

/// Continues prompts as the recipe says, always with the most likely token, so that samples of different steps compare.
#[derive(Debug)]
pub(super) struct PromptSampler {
    tokenizer: Tokenizer,
    config: GenerateConfig,
    rounding: OperandRounding,
    device: Device,
    chat: bool,
}

impl PromptSampler {
    /// The sampler of a session; none if its recipe has no prompts.
    pub(super) fn new(session: &Session) -> anyhow::Result<Option<Self>> {
        let Recipe { eval, .. } = &session.recipe;
        if eval.prompts.is_empty() {
            return Ok(None);
        }
        let files = session.tokenizer_files();
        let files = files.context("`eval.prompts` needs a tokenizer; give `model.tokenizer`")?;
        let tokenizer = Tokenizer::new(files)?;
        if eval.chat && tokenizer.chat_template().is_none() {
            bail!("`eval.chat`: expected a tokenizer with a chat template, found none");
        }
        let stop_ids = end_ids(session)?;
        let config = GenerateConfig {
            max_tokens: eval.max_new_tokens,
            sample: SampleConfig::greedy(),
            stop_ids,
            logprobs: None,
        };
        let chat = eval.chat;
        Ok(Some(Self {
            tokenizer,
            config,
            rounding: session.compute(),
            device: session.device(),
            chat,
        }))
    }

    /// The model's continuation of a prompt.
    pub(super) fn text(&self, model: &Model, prompt: &str) -> anyhow::Result<String> {
        let ids = if self.chat {
            question(&self.tokenizer, prompt)?
        } else {
            self.tokenizer.encode(prompt, Bos::Add)?
        };
        let mut engine = Engine::new(model.clone(), self.rounding, self.device.clone());
        let generation = engine.generate(&ids, &self.config, &mut |_| ControlFlow::Continue(()))?;
        Ok(self
            .tokenizer
            .decode(&generation.token_ids, Special::Skip)?)
    }
}
