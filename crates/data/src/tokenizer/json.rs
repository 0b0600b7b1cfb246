//! The `tokenizer.json` that a GGUF's tokens are written as, and the tokenizer that it describes.

use super::assembly::{BoundedTokenizer, Sections};
use serde::{Serialize, Serializer};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};

/// The kind of a token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// A piece of text that merges make. An unused token is one that no merge makes.
    Piece,
    /// The token for text without a piece.
    Unknown,
    /// A token that controls the model.
    Control,
    /// A text that is matched before anything is merged.
    UserDefined,
    /// One byte of a character without a piece.
    Byte,
}

/// The tokens of a GGUF: distinct texts, each with its kind.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<(Cow<'a, str>, TokenKind)>,
    pub(super) ids: HashMap<Cow<'a, str>, u32>,
}

/// The parts of a `tokenizer.json` that differ between the kinds of tokenizers.
pub(super) struct BpeScheme<'a> {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Bpe<'a>,
}

/// A `tokenizer.json`. It is serialized without a tree of its hundred thousand values, and a tokenizer is built without the
/// text: both took a good part of the time to a first token.
#[derive(Serialize)]
pub(super) struct TokenizerFile<'a> {
    pub(super) version: &'static str,
    pub(super) truncation: (),
    pub(super) padding: (),
    pub(super) added_tokens: Vec<AddedEntry<'a>>,
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) post_processor: Value,
    pub(super) decoder: Value,
    pub(super) model: Bpe<'a>,
}

/// Its `model`.
#[derive(Serialize)]
#[serde(tag = "type", rename = "BPE")]
pub(super) struct Bpe<'a> {
    pub(super) dropout: (),
    pub(super) unk_token: Option<&'a str>,
    pub(super) continuing_subword_prefix: (),
    pub(super) end_of_word_suffix: (),
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
    pub(super) vocab: &'a Vocabulary<'a>,
    pub(super) merges: Vec<(&'a str, &'a str)>,
}

/// One of its `added_tokens`, which are matched in a text before it is split and merged.
#[derive(Serialize)]
pub(super) struct AddedEntry<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

/// Texts with their ids.
impl Serialize for Vocabulary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let texts = self.tokens.iter().map(|(text, _)| text);
        serializer.collect_map(texts.zip(0_u32..))
    }
}

impl TokenizerFile<'_> {
    /// The tokenizer that it describes.
    pub(super) fn build(self) -> tokenizers::Result<BoundedTokenizer> {
        let sections = Sections {
            added_tokens: self.added_tokens.iter().map(AddedEntry::token).collect(),
            normalizer: self.normalizer,
            pre_tokenizer: self.pre_tokenizer,
            decoder: self.decoder,
            ..Sections::default()
        };
        sections.build_with(self.model.build()?.into())
    }
}

impl Bpe<'_> {
    fn build(self) -> tokenizers::Result<BPE> {
        let texts = self.vocab.tokens.iter().zip(0..);
        let vocab: Vocab = texts
            .map(|((text, _), id)| (text.clone().into_owned(), id))
            .collect();
        let merges = self.merges.into_iter();
        let merges = merges.map(|(left, right)| (left.to_owned(), right.to_owned()));
        let builder = BPE::builder()
            .vocab_and_merges(vocab, merges.collect())
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        match self.unk_token {
            Some(token) => builder.unk_token(token.to_owned()).build(),
            None => builder.build(),
        }
    }
}

impl AddedEntry<'_> {
    fn token(&self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }
}

impl Vocabulary<'_> {
    pub(super) fn added_tokens(&self) -> Vec<AddedEntry<'_>> {
        let mut added = Vec::new();
        for ((content, kind), id) in self.tokens.iter().zip(0..) {
            let special = match kind {
                TokenKind::Unknown | TokenKind::Control => true,
                TokenKind::UserDefined => false,
                TokenKind::Piece | TokenKind::Byte => continue,
            };
            added.push(AddedEntry {
                id,
                content,
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: false,
                special,
            });
        }
        added
    }
}
