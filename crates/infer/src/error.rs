//! The one error type of this crate.

use std::path::PathBuf;

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a prompt cannot be continued.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model folder cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// A model cannot be made from its folder.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A tokenizer or chat template fails.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// A stop string that would end every text before it begins.
    #[error("expected stop strings with at least one character, found an empty one")]
    EmptyStop,
    /// Stop strings for a model that writes ids.
    #[error("stop strings: expected a model with a tokenizer, found none")]
    StopWithoutTokenizer,
    /// A conversation without a chat template.
    #[error("expected a tokenizer with a chat template, found none")]
    NoChatTemplate,
    /// A conversation that fills the model's positions.
    #[error(
        "expected the conversation to leave room in the model's {limit} positions, found {found} tokens"
    )]
    ConversationLength {
        /// Tokens of the conversation.
        found: usize,
        /// `max_position_embeddings`.
        limit: usize,
    },
    /// The prompt has no token.
    #[error("expected a prompt of at least one token, found none")]
    EmptyPrompt,
    /// A token outside of the model's vocabulary.
    #[error(
        "prompt token {position}: expected an id below the vocabulary size {vocab_size}, found {id}"
    )]
    Vocabulary {
        /// Where in the prompt, counted from 0.
        position: usize,
        /// The id.
        id: u32,
        /// One more than the largest id the model has.
        vocab_size: usize,
    },
    /// More tokens than the model has positions.
    #[error(
        "expected prompt and new tokens to fit the model's {limit} positions, \
         found {prompt} prompt tokens and up to {max_tokens} new ones"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// Maximum number of new tokens.
        max_tokens: usize,
        /// `max_position_embeddings`.
        limit: usize,
    },
    /// A setting of the sampler is out of range.
    #[error("`{name}`: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// The range.
        expected: &'static str,
        /// The value.
        found: f32,
    },
    /// The model's logits are not finite.
    #[error("new token {step}: expected finite logits, found NaN or infinity")]
    NotFinite {
        /// The number of the new token, counted from 0.
        step: usize,
    },
    /// A token to be scored is outside of the model's vocabulary.
    #[error(
        "request {request}: expected token ids below the vocabulary size {vocab_size}, found {id}"
    )]
    ScoreVocabulary {
        /// The request, counted from 0.
        request: usize,
        /// The id.
        id: u32,
        /// One more than the largest id the model has.
        vocab_size: usize,
    },
    /// A text to be scored has more tokens than the model has positions.
    #[error(
        "request {request}: expected at most the model's {limit} positions, found {found} tokens"
    )]
    ScoreLength {
        /// The request, counted from 0.
        request: usize,
        /// `max_position_embeddings`.
        limit: usize,
        /// Tokens before the last one.
        found: usize,
    },
    /// The probability of a token is not finite.
    #[error("request {request}: expected a finite log-probability, found {found}")]
    ScoreNotFinite {
        /// The request, counted from 0.
        request: usize,
        /// The value.
        found: f64,
    },
    /// `eos_token_id` of a config is malformed.
    #[error("{}: `eos_token_id`: expected a token id or a list of them, found {found}", file.display())]
    EndOfText {
        /// The file.
        file: PathBuf,
        /// The value.
        found: String,
    },
    /// A setting of `generation_config.json` is malformed.
    #[error("{}: `{key}`: expected {expected}, found {found}", file.display())]
    GenerationConfig {
        /// The file.
        file: PathBuf,
        /// The setting.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
        /// The value.
        found: String,
    },
}
