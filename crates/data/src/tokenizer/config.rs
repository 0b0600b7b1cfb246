//! The names of a tokenizer's files, `tokenizer_config.json`, and the numbers of token types in GGUF files.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const CONFIG: &str = "tokenizer_config.json";
/// The name of the template for conversations without tools, or for all if there is no other.
pub(super) const DEFAULT: &str = "default";
pub(crate) const TEMPLATE: &str = "chat_template.jinja";
/// The folder of templates with other names, each in a file of its name.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";
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

/// Keys of `tokenizer_config.json` that change no id and no text here: those of `tokenizer.json` again, limits of Python's
/// interface, and names of classes and files.
const HARMLESS_KEYS: [&str; 36] = [
    "__type",
    "additional_special_tokens",
    "auto_map",
    "backend",
    "clean_up_tokenization_spaces",
    "errors",
    "extra_ids",
    "extra_special_tokens",
    "from_slow",
    "is_local",
    "legacy",
    "local_files_only",
    "max_length",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding_side",
    "processor_class",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "special_tokens_map_file",
    "stride",
    "tokenizer_class",
    "tokenizer_file",
    "tokenizer_type",
    "transformers_version",
    "trim_offsets",
    "truncation_side",
    "truncation_strategy",
    "use_default_system_prompt",
    "use_fast",
    "vocab_file",
    "vocab_size",
];
/// Keys that change nothing as long as they are false, null or empty.
const HARMLESS_IF_OFF: [&str; 5] = [
    "add_prefix_space",
    "do_lower_case",
    "fix_mistral_regex",
    "split_special_tokens",
    "strip_accents",
];

/// The keys of `tokenizer_config.json` that matter here.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    pub(super) add_bos_token: Option<bool>,
    pub(super) add_eos_token: Option<bool>,
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    cls_token: Option<TokenField>,
    sep_token: Option<TokenField>,
    mask_token: Option<TokenField>,
    pub(super) chat_template: Option<TemplateField>,
    added_tokens_decoder: Option<IgnoredAny>,
    /// The names of tokens that `special_tokens_map.json` gave.
    #[serde(skip)]
    mapped: Vec<&'static str>,
    /// The other keys.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// `special_tokens_map.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct SpecialTokensMap {
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    cls_token: Option<TokenField>,
    sep_token: Option<TokenField>,
    mask_token: Option<TokenField>,
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
            ("cls_token", &mut self.cls_token, map.cls_token),
            ("sep_token", &mut self.sep_token, map.sep_token),
            ("mask_token", &mut self.mask_token, map.mask_token),
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

    /// Keys that are neither read nor known to be harmless.
    pub(super) fn unread(&self) -> Vec<String> {
        let is_off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            other => other.as_str() == Some(""),
        };
        let unknown = |(key, value): &(&String, &Value)| {
            let off = HARMLESS_IF_OFF.contains(&key.as_str()) && is_off(value);
            !HARMLESS_KEYS.contains(&key.as_str()) && !off
        };
        let unread = self.rest.iter().filter(unknown);
        unread.map(|(key, _)| key.clone()).collect()
    }

    /// The special tokens by their names in templates.
    pub(super) fn special_tokens(&self) -> BTreeMap<String, Value> {
        let all = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
            ("unk_token", &self.unk_token),
            ("cls_token", &self.cls_token),
            ("sep_token", &self.sep_token),
            ("mask_token", &self.mask_token),
        ];
        all.into_iter()
            .filter_map(|(name, token)| Some((name.to_owned(), token.as_ref()?.text().into())))
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
