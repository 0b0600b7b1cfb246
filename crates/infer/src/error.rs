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
    /// Text cannot be made of tokens.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// A string that would end every text before it begins.
    #[error("expected stop strings with at least one character, found an empty one")]
    EmptyStop,
    /// There is nothing to continue.
    #[error("expected a prompt of at least one token, found none")]
    EmptyPrompt,
    /// A token the model has no embedding for.
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
    /// More positions than the model was made for.
    #[error(
        "expected prompt and new tokens to fit the model's {limit} positions, \
         found {prompt} prompt tokens and up to {max_tokens} new ones"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// New tokens asked for.
        max_tokens: usize,
        /// `max_position_embeddings`.
        limit: usize,
    },
    /// A setting of the sampler has no meaning.
    #[error("`{name}`: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What would have done.
        expected: &'static str,
        /// What was there.
        found: f32,
    },
    /// The model computed something that is no number.
    #[error("new token {step}: expected finite logits, found NaN or infinity")]
    NotFinite {
        /// Which new token was to be chosen, counted from 0.
        step: usize,
    },
    /// A config says something other than ids about where text ends.
    #[error("{}: `eos_token_id`: expected a token id or a list of them, found {found}", file.display())]
    EndOfText {
        /// The file.
        file: PathBuf,
        /// What was there.
        found: String,
    },
}
