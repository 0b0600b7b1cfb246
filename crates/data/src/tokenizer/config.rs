//! The names of a tokenizer's files, `tokenizer_config.json`, and the numbers of token types in GGUF files.

use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::BTreeMap;

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const CONFIG: &str = "tokenizer_config.json";
pub(crate) const TEMPLATE: &str = "chat_template.jinja";
/// Special tokens in folders that older programs wrote.
pub(crate) const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// The numbers of token types in GGUF files.
pub(super) mod token_type {
    pub(in crate::tokenizer) const NORMAL: i32 = 1;
    pub(in crate::tokenizer) const UNKNOWN: i32 = 2;
    pub(in crate::tokenizer) const CONTROL: i32 = 3;
    pub(in crate::tokenizer) const USER_DEFINED: i32 = 4;
    pub(in crate::tokenizer) const UNUSED: i32 = 5;
    pub(in crate::tokenizer) const BYTE: i32 = 6;
}

/// The keys of `tokenizer_config.json` that matter here. The others are for Python.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    pub(super) add_bos_token: Option<bool>,
    pub(super) add_eos_token: Option<bool>,
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    pub(super) chat_template: Option<TemplateField>,
    added_tokens_decoder: Option<IgnoredAny>,
    /// The names of tokens that `special_tokens_map.json` gave.
    #[serde(skip)]
    mapped: Vec<&'static str>,
}

/// `special_tokens_map.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct SpecialTokensMap {
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    unk_token: Option<TokenField>,
}

/// A special token: its text, or an `AddedToken` object.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a special token must be a string or an object with `content`"
)]
enum TokenField {
    Text(String),
    Added { content: String },
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "`chat_template` must be a string or a list of {name, template}"
)]
pub(super) enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
pub(super) struct NamedTemplate {
    pub(super) name: String,
    pub(super) template: String,
}

impl TokenizerConfig {
    /// The config with the special tokens of a `special_tokens_map.json`. As in transformers, these count first if the config
    /// has no `added_tokens_decoder`.
    pub(super) fn with_special_tokens(mut self, map: SpecialTokensMap) -> Self {
        let is_first = self.added_tokens_decoder.is_none();
        for (name, mine, theirs) in [
            ("bos_token", &mut self.bos_token, map.bos_token),
            ("eos_token", &mut self.eos_token, map.eos_token),
            ("pad_token", &mut self.pad_token, map.pad_token),
            ("unk_token", &mut self.unk_token, map.unk_token),
        ] {
            if let Some(theirs) = theirs
                && (is_first || mine.is_none())
            {
                *mine = Some(theirs);
                self.mapped.push(name);
            }
        }
        self
    }

    pub(super) fn set_eos_token(&mut self, text: String) {
        self.eos_token = Some(TokenField::Text(text));
    }

    /// The file that a special token is from.
    pub(super) fn file_of(&self, name: &str) -> &'static str {
        match self.mapped.contains(&name) {
            true => SPECIAL_TOKENS,
            false => CONFIG,
        }
    }

    pub(super) fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_ref().map(TokenField::text)
    }

    pub(super) fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_ref().map(TokenField::text)
    }

    pub(super) fn pad_token(&self) -> Option<&str> {
        self.pad_token.as_ref().map(TokenField::text)
    }

    pub(super) fn unk_token(&self) -> Option<&str> {
        self.unk_token.as_ref().map(TokenField::text)
    }

    /// The special tokens by their names in templates.
    pub(super) fn special_tokens(&self) -> BTreeMap<&'static str, String> {
        let all = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
            ("unk_token", &self.unk_token),
        ];
        all.into_iter()
            .filter_map(|(name, token)| Some((name, token.as_ref()?.text().to_owned())))
            .collect()
    }
}

impl TokenField {
    fn text(&self) -> &str {
        match self {
            Self::Text(content) | Self::Added { content } => content,
        }
    }
}
