//! What the model writes after the recipe's prompts while it is trained.

use std::ops::ControlFlow;

use anyhow::{Context, bail};
use burn::tensor::Device;
use data::{Bos, Special, Tokenizer};
use infer::{Engine, GenerateConfig, SampleConfig};
use model::{Compute, Model};
use train::{Recipe, Session};

use crate::generate::question;

/// Continues prompts as the recipe says, always with the likeliest token, so that samples of different steps compare.
#[derive(Debug)]
pub(super) struct Sampler {
    tokenizer: Tokenizer,
    config: GenerateConfig,
    compute: Compute,
    device: Device,
    chat: bool,
}

impl Sampler {
    /// For a session whose recipe has prompts; none if it has none.
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
        let eos = tokenizer.eos_id();
        let stop_ids = match session.base_folder() {
            Some(base) => infer::end_of_text_ids(base, eos)?,
            None => eos.into_iter().collect(),
        };
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
            compute: session.compute(),
            device: session.device(),
            chat,
        }))
    }

    /// What the model writes after a prompt.
    pub(super) fn text(&self, model: &Model, prompt: &str) -> anyhow::Result<String> {
        let template = self.tokenizer.chat_template().filter(|_| self.chat);
        let ids = match template {
            Some(template) => question(&self.tokenizer, template, prompt)?,
            None => self.tokenizer.encode(prompt, Bos::Add)?,
        };
        let mut engine = Engine::new(model.clone(), self.compute, self.device.clone());
        let generation = engine.generate(&ids, &self.config, &mut |_| ControlFlow::Continue(()))?;
        Ok(self
            .tokenizer
            .decode(&generation.token_ids, Special::Skip)?)
    }
}
