//! The one error type of this crate.
//!
//! Every message is one sentence with the file (and the line or row, if there is one), the expected and the found. Errors
//! inside a row know nothing of files; the reader of the file wraps them in [`Error::Row`].

use std::path::{Path, PathBuf};

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error between a data file and a batch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot read: {problem}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        problem: std::io::Error,
    },

    /// A file, or a folder that it should be in, is a link to nothing.
    #[error("{}: cannot read: `{}` is a link to `{}`, which does not exist", path.display(), link.display(), target.display())]
    BrokenLink {
        /// The file.
        path: PathBuf,
        /// The link: the file, or a folder of it.
        link: PathBuf,
        /// Where the link leads.
        target: PathBuf,
    },

    /// A repository was copied without its large files.
    #[error("{}: this is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository, or download the file again", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },

    /// A file is larger than any real one.
    #[error("{}: expected at most {limit_bytes} bytes, found more", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Maximum size.
        limit_bytes: u64,
    },

    /// A whole file (tokenizer, configuration, template, ids) is malformed.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The expected and the found.
        problem: String,
    },

    /// A row of a file is malformed.
    #[error("{}{place}: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The place in it.
        place: Place,
        /// The problem.
        problem: Box<Self>,
    },

    /// A value has the wrong shape.
    #[error("expected {expected}, found {found}")]
    Schema {
        /// The accepted values.
        expected: String,
        /// The value.
        found: String,
    },

    /// A row has text, but without a tokenizer only token ids can be read.
    #[error("expected a row of `input_ids` because no tokenizer is given, found text")]
    NoTokenizer,

    /// A row has messages, but the model has no chat template.
    #[error("the row has messages, but the model has no chat template")]
    NoChatTemplate,

    /// A template of a task fails, or is malformed.
    #[error("template: {0}")]
    TaskTemplate(String),
    /// The chat template refused the messages, or is malformed.
    #[error("chat template: {0}")]
    Template(String),

    /// The text of an assistant turn cannot be told from the rest of the conversation.
    #[error("chat template: cannot tell which text is that of assistant message {index}")]
    Turn {
        /// The message, counted from 0.
        index: usize,
    },

    /// The chat template shows a part of a conversation nowhere.
    #[error(
        "the chat template leaves out {part} of message {index} (role `{role}`): remove it from the row, or give the model a template that shows it"
    )]
    LeftOut {
        /// The key within the message.
        part: String,
        /// The message, counted from 0.
        index: usize,
        /// Its role.
        role: String,
    },

    /// The tokenizer failed on a text or on ids.
    #[error("tokenizer: {0}")]
    Tokenize(String),

    /// A token without an embedding in the model.
    #[error(
        "expected token ids below the vocabulary size {vocab_size}, found {id}; the model has no embedding for it: use \
         the model's own tokenizer, or a model whose embedding was enlarged for this one"
    )]
    Vocabulary {
        /// The token id.
        id: u32,
        /// One more than the largest id of the model.
        vocab_size: usize,
    },

    /// Sequences of one token have nothing to predict.
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

    /// A file was changed after it was opened.
    #[error("{}: was changed while it was in use; start again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// Tokens in the cache are not those that were written.
    #[error("{}: this file of the token cache is damaged; delete it, and it will be made again", path.display())]
    TokenCache {
        /// The file.
        path: PathBuf,
    },

    /// No token of a whole split is a target.
    #[error(
        "{}: no token to train on in {rows} rows; each is masked, or cut before its first trained token by the maximum \
         length (`data.max_length`)",
        path.display()
    )]
    NothingTrained {
        /// The file.
        path: PathBuf,
        /// Number of its rows.
        rows: usize,
    },
}

/// The place of a row in its file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of text.
    Line(usize),
    /// A row of a table that has no lines.
    Row(usize),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(number) => write!(f, ":{number}"),
            Self::Row(number) => write!(f, ", row {number}"),
        }
    }
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

    /// The error with its file and place.
    pub(crate) fn at(self, path: &Path, place: Place) -> Self {
        Self::Row {
            path: path.to_path_buf(),
            place,
            problem: Box::new(self),
        }
    }
}
