//! The one error type of this crate.
//!
//! Every message is one sentence that names the file (and the line or row, where there is one),
//! what was expected and what was found. Errors that happen inside a row know nothing of files;
//! the reader of the file wraps them in [`Error::Row`].

use std::path::{Path, PathBuf};

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a data file and a batch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot read: {problem}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: std::io::Error,
    },

    /// A file is larger than anything legitimate.
    #[error("{}: expected at most {limit_bytes} bytes, found more", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The largest size that is read.
        limit_bytes: u64,
    },

    /// A whole file (tokenizer, configuration, template, ids) is not what it should be.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        problem: String,
    },

    /// A line of a JSON-lines file is not what it should be.
    #[error("{}:{line}: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: Box<Self>,
    },

    /// A value has the wrong shape.
    #[error("expected {expected}, found {found}")]
    Schema {
        /// What is accepted.
        expected: String,
        /// What is there.
        found: String,
    },

    /// A row holds text, but only token ids can be read without a tokenizer.
    #[error("expected a row of `input_ids` because no tokenizer is given, found text")]
    NoTokenizer,

    /// A row holds messages, but the model has no template to render them with.
    #[error("the row holds messages, but the model folder has no chat template")]
    NoChatTemplate,

    /// The chat template refused the messages, or is itself broken.
    #[error("chat template: {0}")]
    Template(String),

    /// What one assistant turn renders to cannot be told from the rest of the conversation.
    #[error("chat template: cannot tell which text is that of assistant message {index}")]
    Turn {
        /// The message, counted from 0.
        index: usize,
    },

    /// The tokenizer failed on a text or on ids.
    #[error("tokenizer: {0}")]
    Tokenize(String),

    /// A token the model has no embedding for.
    #[error("expected token ids below the vocabulary size {vocab_size}, found {id}")]
    Vocabulary {
        /// The token id.
        id: u32,
        /// One more than the largest id the model has.
        vocab_size: usize,
    },

    /// Sequences so short hold nothing to predict.
    #[error("expected a maximum length of at least 2 tokens, found {0}")]
    MaxLength(usize),

    /// A choice leaves no room for its prompt.
    #[error("choice {index} alone is {tokens} tokens, expected fewer than {max_length}")]
    ChoiceLength {
        /// The choice, counted from 0.
        index: usize,
        /// Its length.
        tokens: usize,
        /// The longest sequence allowed, prompt included.
        max_length: usize,
    },

    /// A file is no longer what was read first.
    #[error("{}: was changed while it was in use; start again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// Tokens in the cache are not those that were put there.
    #[error("{}: this file of the token cache is damaged; delete it, and it is made again", path.display())]
    TokenCache {
        /// The file.
        path: PathBuf,
    },

    /// No token of a whole split is a target.
    #[error("{}: no token to train on in {rows} rows", path.display())]
    NothingTrained {
        /// The file.
        path: PathBuf,
        /// How many rows it has.
        rows: usize,
    },
}

impl Error {
    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }

    pub(crate) fn schema(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Schema {
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Says on which line of which file this happened.
    pub(crate) fn at(self, path: &Path, line: usize) -> Self {
        Self::Row {
            path: path.to_path_buf(),
            line,
            problem: Box::new(self),
        }
    }
}
