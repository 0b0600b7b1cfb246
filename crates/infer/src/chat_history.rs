//! A conversation in a model's chat template.
//!
//! Each turn renders the whole conversation. The model reads only what follows the tokens it has read before, whatever
//! the template does to earlier turns, such as removing their reasoning.

use std::sync::Arc;

use data::{Bos, GenerationPrompt, Tokenizer};
use serde_json::{Value, json};

use crate::completion::{Completed, Completion};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::sequence::{FinishReason, GenerateConfig, KvPrefix, Sequence};

/// Messages, and the tokens of them that the model has read.
#[derive(Clone, Debug)]
pub struct ChatHistory {
    tokenizer: Arc<Tokenizer>,
    generation_prompt: GenerationPrompt,
    system: Option<String>,
    messages: Vec<Value>,
    prefix: Option<KvPrefix>,
}

impl ChatHistory {
    /// A conversation that begins with a system message, if there is one. The tokenizer needs a chat template.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        generation_prompt: GenerationPrompt,
        system: Option<String>,
    ) -> Self {
        let mut conversation = Self {
            tokenizer,
            generation_prompt,
            system,
            messages: Vec::new(),
            prefix: None,
        };
        conversation.clear();
        conversation
    }

    /// Forgets all messages except the system message.
    pub fn clear(&mut self) {
        self.prefix = None;
        let system = self.system.iter();
        self.messages = system.map(|text| message("system", text)).collect();
    }

    /// Adds a user message and starts the answer, which has `config.max_tokens` tokens or fewer if the model's
    /// positions leave less room. If the answer cannot start, the message is forgotten.
    ///
    /// # Errors
    /// If the template cannot render the messages, or they leave no room for an answer; and as [`Completion::new`].
    pub fn ask(
        &mut self,
        engine: &Engine,
        text: &str,
        config: &GenerateConfig,
        stops: &[String],
    ) -> Result<Completion> {
        self.messages.push(message("user", text));
        let started = self.start(engine, config);
        let tokenizer = Some(Arc::clone(&self.tokenizer));
        let completion = started.and_then(|sequence| Completion::new(sequence, tokenizer, stops));
        if completion.is_err() {
            self.messages.pop();
        }
        completion
    }

    /// Takes an answer into the conversation. If it was cancelled before its first token, the question is forgotten.
    pub fn answer(&mut self, answer: &Completed) {
        let generation = &answer.generation;
        let is_empty = generation.token_ids.is_empty();
        if is_empty && generation.finish_reason == FinishReason::Cancelled {
            self.messages.pop();
        } else {
            self.messages.push(message("assistant", &answer.text));
        }
        self.prefix = Some(answer.prefix.clone());
    }

    fn start(&mut self, engine: &Engine, config: &GenerateConfig) -> Result<Sequence> {
        let prompt = chat_prompt(&self.tokenizer, &self.messages, self.generation_prompt)?;
        let limit = engine.model.config.max_position_embeddings;
        let found = prompt.len();
        if found >= limit {
            return Err(Error::ConversationLength { found, limit });
        }
        let config = GenerateConfig {
            max_tokens: config.max_tokens.min(limit - found),
            ..config.clone()
        };
        let prefix = self.prefix.take();
        let prefix = prefix.unwrap_or_else(|| engine.empty_prefix());
        Sequence::new(&engine.model, prefix, &prompt, &config)
    }
}

/// The token ids of messages in the tokenizer's chat template.
///
/// # Errors
/// If there is no template, or it cannot render the messages.
pub fn chat_prompt(
    tokenizer: &Tokenizer,
    messages: &[Value],
    generation_prompt: GenerationPrompt,
) -> Result<Vec<u32>> {
    let template = tokenizer.chat_template().ok_or(Error::NoChatTemplate)?;
    let text = template.render(messages, None, generation_prompt)?;
    Ok(tokenizer.encode(&text, Bos::Never)?)
}

/// A message as chat templates expect it.
pub fn message(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}
