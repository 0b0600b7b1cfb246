//! What a tokenizer is made of: a model folder's files, or what a GGUF says, which can be written as
//! such files.

use super::chat_template::{CONFIG, TEMPLATE};
use super::from_gguf::GgufTokens;
use crate::error::{Error, Result};
use crate::file::read_text;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The largest published `tokenizer.json` is a tenth of this.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Templates are a few kilobytes and tokenizer configurations a few hundred at most.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` if there are any.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    origin: Origin,
    pub(crate) tokens: Tokens,
    pub(crate) config: Option<String>,
    pub(crate) chat_template: Option<String>,
}

/// What says which tokens there are.
#[derive(Clone, Debug)]
pub(crate) enum Tokens {
    /// A `tokenizer.json`.
    Text(String),
    /// Those of a GGUF, which are seldom written.
    Gguf(Arc<GgufTokens>),
}

/// Where the texts are from, for messages.
#[derive(Clone, Debug)]
enum Origin {
    Folder(PathBuf),
    Gguf(PathBuf),
}

impl TokenizerFiles {
    /// Reads the files of a model folder; `None` if it has no `tokenizer.json`.
    ///
    /// # Errors
    /// If a file cannot be read, is far too large, or is no text. What the texts say is checked
    /// by [`Tokenizer::new`](crate::Tokenizer::new).
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        read_text(&folder.join(TOKENIZER), MAX_TOKENIZER_BYTES)?
            .map(|tokenizer| Self::beside(folder, tokenizer))
            .transpose()
    }

    /// [`TokenizerFiles::read`], for a folder that must have a `tokenizer.json`.
    ///
    /// # Errors
    /// As there, and if there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::read(folder)?.ok_or_else(|| Error::Read {
            path: folder.join(TOKENIZER),
            problem: std::io::ErrorKind::NotFound.into(),
        })
    }

    /// A `tokenizer.json` with the other files of its folder.
    pub(crate) fn beside(folder: &Path, tokenizer: String) -> Result<Self> {
        Ok(Self {
            origin: Origin::Folder(folder.to_path_buf()),
            tokens: Tokens::Text(tokenizer),
            config: read_text(&folder.join(CONFIG), MAX_CONFIG_BYTES)?,
            chat_template: read_text(&folder.join(TEMPLATE), MAX_CONFIG_BYTES)?,
        })
    }

    /// What a GGUF says of its tokens. `path` is the GGUF's, for messages.
    ///
    /// # Errors
    /// If the tokens are of a kind not known here, or one with a role is none of them. The message
    /// names the GGUF's key.
    pub(crate) fn from_gguf(path: &Path, tokens: GgufTokens) -> Result<Self> {
        let config = tokens.config();
        let config = config.map_err(|problem| Error::malformed(path, problem))?;
        Ok(Self {
            origin: Origin::Gguf(path.to_path_buf()),
            tokens: Tokens::Gguf(Arc::new(tokens)),
            // People read this one.
            config: Some(format!("{config:#}\n")),
            chat_template: None,
        })
    }

    /// Names and texts, for a folder that is to have the same tokenizer.
    ///
    /// # Errors
    /// If the tokens of a GGUF contradict themselves.
    pub fn files(&self) -> Result<Vec<(&'static str, Cow<'_, str>)>> {
        let optional = [(CONFIG, &self.config), (TEMPLATE, &self.chat_template)];
        let optional = optional
            .into_iter()
            .filter_map(|(name, text)| Some((name, Cow::Borrowed(text.as_deref()?))));
        Ok(std::iter::once((TOKENIZER, self.tokenizer_json()?))
            .chain(optional)
            .collect())
    }

    /// The text of `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Result<Cow<'_, str>> {
        Ok(match &self.tokens {
            Tokens::Text(text) => Cow::Borrowed(text.as_str()),
            Tokens::Gguf(tokens) => Cow::Owned(tokens.to_json().map_err(self.contradicted())?),
        })
    }

    /// An error about what a GGUF says of its tokens.
    pub(super) fn contradicted(&self) -> impl FnOnce(String) -> Error {
        let (Origin::Folder(path) | Origin::Gguf(path)) = &self.origin;
        |problem| Error::malformed(path, problem)
    }

    /// Says in which file, or by which key of a GGUF, the problem came.
    pub(crate) fn malformed(&self, name: &str, problem: &str) -> Error {
        match &self.origin {
            Origin::Folder(folder) => Error::malformed(&folder.join(name), problem),
            Origin::Gguf(path) => {
                let key = match name {
                    TOKENIZER => "tokenizer.ggml",
                    _ => "tokenizer.chat_template",
                };
                Error::malformed(path, format!("`{key}`: {problem}"))
            }
        }
    }
}
