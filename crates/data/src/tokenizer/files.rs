//! The texts a tokenizer is made of: a model folder's files, or what a GGUF says written as such
//! files.
//!
//! Everything about tokens goes through these texts, wherever they are from, so that what is
//! used here and what an export writes cannot differ.

use super::gguf::GgufTokens;
use crate::chat_template::{CONFIG, TEMPLATE};
use crate::error::{Error, Result};
use crate::file::read_text;
use std::path::{Path, PathBuf};

/// The largest published `tokenizer.json` is a tenth of this.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Templates are a few kilobytes and tokenizer configurations a few hundred at most.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` if there are any.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    origin: Origin,
    pub(crate) tokenizer: String,
    pub(crate) config: Option<String>,
    pub(crate) chat_template: Option<String>,
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
            tokenizer,
            config: read_text(&folder.join(CONFIG), MAX_CONFIG_BYTES)?,
            chat_template: read_text(&folder.join(TEMPLATE), MAX_CONFIG_BYTES)?,
        })
    }

    /// Writes what a GGUF says of its tokens as the files of a model folder. `path` is the
    /// GGUF's, for messages.
    ///
    /// # Errors
    /// If the tokens are of a kind not known here or contradict themselves. The message names
    /// the GGUF's key.
    pub(crate) fn from_gguf(path: &Path, tokens: &GgufTokens) -> Result<Self> {
        let (tokenizer, config) = tokens
            .to_json()
            .map_err(|problem| Error::malformed(path, problem))?;
        Ok(Self {
            origin: Origin::Gguf(path.to_path_buf()),
            tokenizer,
            // People read this one.
            config: Some(format!("{config:#}\n")),
            chat_template: None,
        })
    }

    /// The same again from what [`TokenizerFiles::files`] gave of a GGUF's tokenizer; `None` if
    /// that is nothing.
    pub fn of_texts(path: &Path, texts: &[(String, String)]) -> Option<Self> {
        let text = |wanted: &str| {
            let found = texts.iter().find(|(name, _)| name == wanted)?;
            Some(found.1.clone())
        };
        Some(Self {
            origin: Origin::Gguf(path.to_path_buf()),
            tokenizer: text(TOKENIZER)?,
            config: text(CONFIG),
            chat_template: text(TEMPLATE),
        })
    }

    /// Names and texts, for a folder that is to have the same tokenizer.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        let optional = [(CONFIG, &self.config), (TEMPLATE, &self.chat_template)];
        let optional = optional
            .into_iter()
            .filter_map(|(name, text)| Some((name, text.as_deref()?)));
        std::iter::once((TOKENIZER, self.tokenizer.as_str())).chain(optional)
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
