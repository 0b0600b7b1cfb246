//! The files of a tokenizer: those of a model folder, or those that a GGUF's tokens can be written as.

use super::config::{CONFIG, SPECIAL_TOKENS, TEMPLATE, TEMPLATES, TOKENIZER, TokenizerConfig};
use super::from_gguf::GgufTokens;
use crate::error::{Error, Result};
use crate::file::read_text;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Ten times the largest published `tokenizer.json`.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Templates are a few kilobytes and tokenizer configurations a few hundred at most.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Published models have at most three templates.
const MAX_TEMPLATES: usize = 16;

/// `tokenizer.json`, and `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` if there are any.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    provenance: Provenance,
    pub(crate) tokens: Tokens,
    config: Option<String>,
    special_tokens: Option<String>,
    pub(crate) chat_template: Option<String>,
    /// Those of the folder `additional_chat_templates`: paths within the model's folder, and texts.
    pub(super) additional_templates: Vec<(String, String)>,
}

/// The source of the vocabulary.
#[derive(Clone, Debug)]
pub(crate) enum Tokens {
    /// A `tokenizer.json`.
    Text(String),
    /// The tokens of a GGUF, which are seldom written as JSON.
    Gguf(Arc<GgufTokens>),
}

/// The origin of the texts, for messages.
#[derive(Clone, Debug)]
enum Provenance {
    Folder(PathBuf),
    Gguf(PathBuf),
}

impl TokenizerFiles {
    /// Reads the files of a model folder; `None` if it has no `tokenizer.json`.
    ///
    /// # Errors
    /// If a file cannot be read, is far too large, or is not text. [`Tokenizer::new`](crate::Tokenizer::new) checks the
    /// content.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        read_text(&folder.join(TOKENIZER), MAX_TOKENIZER_BYTES)?
            .map(|tokenizer| Self::with_siblings(folder, tokenizer))
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
    pub(crate) fn with_siblings(folder: &Path, tokenizer: String) -> Result<Self> {
        Ok(Self {
            provenance: Provenance::Folder(folder.to_path_buf()),
            tokens: Tokens::Text(tokenizer),
            config: read_text(&folder.join(CONFIG), MAX_CONFIG_BYTES)?,
            special_tokens: read_text(&folder.join(SPECIAL_TOKENS), MAX_CONFIG_BYTES)?,
            chat_template: read_text(&folder.join(TEMPLATE), MAX_CONFIG_BYTES)?,
            additional_templates: additional_templates(folder)?,
        })
    }

    /// The tokenizer of a GGUF's tokens. `path` is the GGUF's, for messages.
    ///
    /// # Errors
    /// If the tokens are of an unknown kind, or one with a role is not in the vocabulary. The message names the GGUF's key.
    pub(crate) fn from_gguf(path: &Path, tokens: GgufTokens) -> Result<Self> {
        let config = tokens.config();
        let config = config.map_err(|problem| Error::malformed(path, problem))?;
        Ok(Self {
            provenance: Provenance::Gguf(path.to_path_buf()),
            tokens: Tokens::Gguf(Arc::new(tokens)),
            // People read this one.
            config: Some(format!("{config:#}\n")),
            special_tokens: None,
            chat_template: None,
            additional_templates: Vec::new(),
        })
    }

    /// Names and texts, for a folder with the same tokenizer.
    ///
    /// # Errors
    /// If the tokens of a GGUF contradict themselves.
    pub fn files(&self) -> Result<Vec<(&str, Cow<'_, str>)>> {
        let optional = [
            (CONFIG, &self.config),
            (SPECIAL_TOKENS, &self.special_tokens),
            (TEMPLATE, &self.chat_template),
        ];
        let optional = optional
            .into_iter()
            .filter_map(|(name, text)| Some((name, Cow::Borrowed(text.as_deref()?))));
        let additional = self.additional_templates.iter();
        let additional = additional.map(|(name, text)| (name.as_str(), Cow::Borrowed(&**text)));
        Ok(std::iter::once((TOKENIZER, self.tokenizer_json()?))
            .chain(optional)
            .chain(additional)
            .collect())
    }

    /// The parsed `tokenizer_config.json`, the default if there is none, with the tokens of `special_tokens_map.json`.
    pub(super) fn config(&self) -> Result<TokenizerConfig> {
        let config: TokenizerConfig = self.parsed(CONFIG, self.config.as_deref())?;
        let special_tokens = self.parsed(SPECIAL_TOKENS, self.special_tokens.as_deref())?;
        Ok(config.with_special_tokens(special_tokens))
    }

    fn parsed<T: DeserializeOwned + Default>(&self, name: &str, text: Option<&str>) -> Result<T> {
        let Some(text) = text else {
            return Ok(T::default());
        };
        serde_json::from_str(text).map_err(|problem| {
            // The reader of a whole file does not say which key is at fault.
            let of_key = serde_json::from_str(text).ok().and_then(key_at_fault::<T>);
            self.malformed(name, &of_key.unwrap_or_else(|| problem.to_string()))
        })
    }

    /// The folder of the files; none for those of a GGUF.
    pub(super) fn folder(&self) -> Option<&Path> {
        match &self.provenance {
            Provenance::Folder(folder) => Some(folder),
            Provenance::Gguf(_) => None,
        }
    }

    /// The text of `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Result<Cow<'_, str>> {
        Ok(match &self.tokens {
            Tokens::Text(text) => Cow::Borrowed(text.as_str()),
            Tokens::Gguf(tokens) => Cow::Owned(tokens.to_json().map_err(self.contradicted())?),
        })
    }

    /// An error about contradictions in a GGUF's tokens.
    pub(super) fn contradicted(&self) -> impl FnOnce(String) -> Error {
        let (Provenance::Folder(path) | Provenance::Gguf(path)) = &self.provenance;
        |problem| Error::malformed(path, problem)
    }

    /// A problem with its place: the file, or the key of a GGUF.
    pub(crate) fn malformed(&self, name: &str, problem: &str) -> Error {
        match &self.provenance {
            Provenance::Folder(folder) => Error::malformed(&folder.join(name), problem),
            Provenance::Gguf(path) => {
                let key = match name {
                    TOKENIZER => "tokenizer.ggml",
                    _ => "tokenizer.chat_template",
                };
                Error::malformed(path, format!("`{key}`: {problem}"))
            }
        }
    }
}

/// The problem of the first key that cannot be read.
fn key_at_fault<T: DeserializeOwned>(config: Map<String, Value>) -> Option<String> {
    config.into_iter().find_map(|(key, value)| {
        let alone = Value::Object(Map::from_iter([(key.clone(), value)]));
        let problem = serde_json::from_value::<T>(alone).err()?;
        Some(format!("`{key}`: {problem}"))
    })
}

/// The templates in the folder for those with a name, sorted.
fn additional_templates(folder: &Path) -> Result<Vec<(String, String)>> {
    let path = folder.join(TEMPLATES);
    let read = |problem| Error::Read {
        path: path.clone(),
        problem,
    };
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(problem) if problem.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(problem) => return Err(read(problem)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(read)?.file_name();
        let Some(name) = name.to_str().filter(|name| name.ends_with(".jinja")) else {
            continue;
        };
        if found.len() == MAX_TEMPLATES {
            let problem = format!("expected at most {MAX_TEMPLATES} templates, found more");
            return Err(Error::malformed(&path, problem));
        }
        if let Some(text) = read_text(&path.join(name), MAX_CONFIG_BYTES)? {
            found.push((format!("{TEMPLATES}/{name}"), text));
        }
    }
    found.sort();
    Ok(found)
}
