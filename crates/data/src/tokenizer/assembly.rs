//! The library's tokenizer, put together from the sections of an untrusted `tokenizer.json`.
//!
//! The library would read the file itself, and run its steps without bounds (even while it reads, for each added token); see
//! [`steps`](super::steps). Sections that this crate switches off are not read: truncation, padding, and the post-processor but
//! for its BOS.

use serde::Deserialize;
use serde_json::Value;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use tokenizers::{AddedToken, ModelWrapper, PostProcessorWrapper, Result, TokenizerImpl};

use super::steps::{self, DecodeStep, Exceeded, NormalizeStep, SplitStep, Steps};

/// A tokenizer with bounded steps and no post-processor.
pub(super) type BoundedTokenizer = TokenizerImpl<
    ModelWrapper,
    Steps<NormalizeStep>,
    Steps<SplitStep>,
    PostProcessorWrapper,
    Steps<DecodeStep>,
>;

/// The longest token. The longest published ones are 512 spaces.
pub(super) const MOST_TOKEN_BYTES: usize = 1 << 14;
/// Added tokens, and their bytes: a search tree of many times the size is made of them.
const MOST_ADDED_TOKENS: usize = 1 << 20;
const MOST_ADDED_BYTES: usize = 1 << 24;
/// WordPiece takes the cube of the length of a word.
const MOST_WORD_CHARS: usize = 1000;
/// BPE and WordPiece add these to each character.
const MOST_AFFIX_BYTES: usize = 64;

/// The sections of a `tokenizer.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Sections {
    pub(super) version: Option<String>,
    pub(super) added_tokens: Vec<AddedToken>,
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) post_processor: Value,
    pub(super) decoder: Value,
    pub(super) model: Value,
}

impl Sections {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is malformed.
    pub(super) fn read(text: &str) -> Result<Self> {
        let sections: Self = serde_json::from_str(text)?;
        match sections.version.as_deref() {
            None | Some("1.0") => Ok(sections),
            Some(found) => Err(format!("expected `version` 1.0, found `{found}`").into()),
        }
    }

    /// The tokenizer of these sections, and the token that its post-processor puts before a text.
    ///
    /// # Errors
    /// If a section is malformed, or asks for more than any published one.
    pub(super) fn build(mut self) -> Result<(BoundedTokenizer, Option<u32>)> {
        let model = read_model(self.model.take())?;
        let bos = bos_of(&self.post_processor)?;
        Ok((self.build_with(model)?, bos))
    }

    /// The tokenizer of a model and the other sections.
    ///
    /// # Errors
    /// As [`Sections::build`].
    pub(super) fn build_with(self, model: ModelWrapper) -> Result<BoundedTokenizer> {
        check_added(&self.added_tokens)?;
        let mut tokenizer = BoundedTokenizer::new(model);
        tokenizer.with_normalizer(Steps::normalizer(self.normalizer)?);
        tokenizer.with_pre_tokenizer(Steps::pre_tokenizer(self.pre_tokenizer)?);
        tokenizer.with_decoder(Steps::decoder(self.decoder)?);
        tokenizer.add_tokens(&self.added_tokens);
        Ok(tokenizer)
    }
}

fn check_added(tokens: &[AddedToken]) -> Result<()> {
    let problem = |expected: &str, found: usize| {
        Err(format!("`added_tokens`: expected {expected}, found {found}").into())
    };
    let bytes: usize = tokens.iter().map(|token| token.content.len()).sum();
    let longest = tokens.iter().map(|token| token.content.len()).max();
    if tokens.len() > MOST_ADDED_TOKENS {
        return problem(&format!("at most {MOST_ADDED_TOKENS}"), tokens.len());
    }
    if bytes > MOST_ADDED_BYTES {
        return problem(&format!("at most {MOST_ADDED_BYTES} bytes in all"), bytes);
    }
    match longest {
        Some(longest) if longest > MOST_TOKEN_BYTES => {
            problem(&format!("at most {MOST_TOKEN_BYTES} bytes"), longest)
        }
        _ => Ok(()),
    }
}

/// The `model`. The library would copy it twice more to learn its type.
fn read_model(mut json: Value) -> Result<ModelWrapper> {
    let problem = |problem: serde_json::Error| format!("`model`: {problem}");
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        let length = json[key].as_str().map_or(0, str::len);
        if length > MOST_AFFIX_BYTES {
            return Err(format!(
                "`model.{key}`: expected at most {MOST_AFFIX_BYTES} bytes, found {length}"
            )
            .into());
        }
    }
    let word = json["max_input_chars_per_word"].as_u64().unwrap_or(0);
    if word > MOST_WORD_CHARS as u64 {
        return Err(format!(
            "`model.max_input_chars_per_word`: expected at most {MOST_WORD_CHARS}, found {word}"
        )
        .into());
    }
    let kind = json.as_object_mut().and_then(|model| model.remove("type"));
    let model = match kind.as_ref().and_then(Value::as_str) {
        Some("BPE") => serde_json::from_value(json).map(ModelWrapper::BPE),
        Some("WordPiece") => serde_json::from_value(json).map(ModelWrapper::WordPiece),
        Some("WordLevel") => serde_json::from_value(json).map(ModelWrapper::WordLevel),
        Some("Unigram") => serde_json::from_value(json).map(ModelWrapper::Unigram),
        // Old files have no type.
        _ => serde_json::from_value(json),
    };
    let mut model = model.map_err(problem)?;
    // The same text always has the same ids.
    if let ModelWrapper::BPE(bpe) = &mut model {
        bpe.dropout = None;
    }
    Ok(model)
}

/// The token that a post-processor puts before a text, if it is one. It is read instead of run: a template may repeat a text,
/// and a sequence of them may do so many times.
fn bos_of(json: &Value) -> Result<Option<u32>> {
    steps::check("post_processor", json)?;
    // The library knows what is malformed.
    let checked = serde_json::from_value::<Option<PostProcessorWrapper>>(json.clone());
    checked.map_err(|problem| format!("`post_processor`: {problem}"))?;
    Ok(first_token(json))
}

fn first_token(processor: &Value) -> Option<u32> {
    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
    match processor["type"].as_str()? {
        "BertProcessing" | "RobertaProcessing" => id(&processor["cls"][1]),
        "TemplateProcessing" => {
            let [first, second, ..] = processor["single"].as_array()?.as_slice() else {
                return None;
            };
            second.get("Sequence")?;
            let name = first["SpecialToken"]["id"].as_str()?;
            match processor["special_tokens"][name]["ids"]
                .as_array()?
                .as_slice()
            {
                [only] => id(only),
                _ => None,
            }
        }
        "Sequence" => processor["processors"]
            .as_array()?
            .iter()
            .find_map(first_token),
        _ => None,
    }
}

thread_local! {
    /// Whether panics of this thread are errors of a file.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs the tokenizers library on untrusted content. It panics on some malformed files (an unreadable character map, pieces of
/// length 0, a decoder without a suffix); here these are errors of the file, and nothing of them is printed.
pub(super) fn guarded<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    static QUIET_HOOK: Once = Once::new();
    QUIET_HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_GUARDED.get() {
                hook(panic);
            }
        }));
    });
    let was_guarded = IS_GUARDED.replace(true);
    // Nothing that a panic could have left half done is used again: the caller gets the error.
    let result = catch_unwind(AssertUnwindSafe(act));
    IS_GUARDED.set(was_guarded);
    result.unwrap_or_else(|panic| {
        Err(match panic.downcast::<Exceeded>() {
            Ok(exceeded) => exceeded.0.into(),
            Err(_) => "the tokenizers library broke down on this file".into(),
        })
    })
}
