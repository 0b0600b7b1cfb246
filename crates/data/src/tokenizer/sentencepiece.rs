//! SentencePiece BPE, as `tokenizer.json` has it.
//!
//! SentencePiece has no merges: it joins the two neighbors that form the token with the highest score, the leftmost of equals,
//! until no neighbors form a token. `tokenizer.json` has a list of merges in the order of their application. So each way to
//! form a token from two others is a merge, and merges are ordered by the score of the token that they form.
//!
//! Both agree as long as scores are distinct, as in trained vocabularies. Several ways to form one token have one score; among
//! them the order of ids decides, as in Hugging Face's own conversion.
//!
//! Source: ggml-org/llama.cpp: src/llama-vocab.cpp, `llm_tokenizer_spm_session`;
//! huggingface/transformers: src/transformers/convert_slow_tokenizer.py, `generate_merges`.

use super::json::{Bpe, BpeScheme, TokenKind, Vocabulary};
use serde_json::{Value, json};

/// The character for a space.
const SPACE: &str = "\u{2581}";
/// The longest token that is split into halves: the search takes the square of its length. Trained tokens have at most a few
/// dozen bytes.
const MAX_TOKEN_BYTES: usize = 1024;

/// The parts of a `tokenizer.json` with these tokens. `scores` has one for each token; `prefix` says whether a text gets a
/// space before it.
pub(super) fn scheme<'a>(
    vocabulary: &'a Vocabulary<'_>,
    scores: &[f32],
    prefix: bool,
) -> Result<BpeScheme<'a>, String> {
    let replaced = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replaced(" ", SPACE)];
    let mut decoders = vec![
        replaced(SPACE, " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(BpeScheme {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Bpe {
            dropout: (),
            unk_token: unknown(vocabulary)?,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: true,
            byte_fallback: true,
            ignore_merges: false,
            vocab: vocabulary,
            merges: merges(vocabulary, scores)?,
        },
    })
}

/// The token for text without a piece. There may be none if every byte has a token.
fn unknown<'a>(vocabulary: &'a Vocabulary<'_>) -> Result<Option<&'a str>, String> {
    let mut tokens = vocabulary.tokens.iter();
    let unknown = tokens.find(|(_, kind)| *kind == TokenKind::Unknown);
    let byte = |byte: u8| format!("<0x{byte:02X}>");
    let missing = |byte: &String| !vocabulary.ids.contains_key(byte.as_str());
    match ((0..=u8::MAX).map(byte).find(missing), unknown) {
        (_, Some((text, _))) => Ok(Some(text)),
        (None, None) => Ok(None),
        (Some(byte), None) => Err(format!(
            "`tokenizer.ggml.tokens`: expected a token for every byte or one of type 2 (unknown), \
             found no {byte}"
        )),
    }
}

/// Each way to form a token from two others, the highest score first.
fn merges<'a>(
    vocabulary: &'a Vocabulary<'_>,
    scores: &[f32],
) -> Result<Vec<(&'a str, &'a str)>, String> {
    check_scores(scores, vocabulary.tokens.len())?;
    let piece = |text: &str| {
        let id = *vocabulary.ids.get(text)?;
        (vocabulary.tokens[id as usize].1 == TokenKind::Piece).then_some(id)
    };
    let mut merges = Vec::new();
    for (id, (text, kind)) in vocabulary.tokens.iter().enumerate() {
        if *kind != TokenKind::Piece {
            continue;
        }
        if text.len() > MAX_TOKEN_BYTES {
            let bytes = text.len();
            return Err(format!(
                "`tokenizer.ggml.tokens`: expected at most {MAX_TOKEN_BYTES} bytes, found {bytes} \
                 in token {id}"
            ));
        }
        for (end, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(end);
            if let (Some(left_id), Some(right_id)) = (piece(left), piece(right)) {
                merges.push((scores[id], id, left_id, right_id, (left, right)));
            }
        }
    }
    if merges.is_empty() {
        return Err("`tokenizer.ggml.tokens`: expected tokens made of others, found none".into());
    }
    merges.sort_by(|a, b| {
        let best = b.0.total_cmp(&a.0);
        best.then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
    });
    Ok(merges.into_iter().map(|(.., pair)| pair).collect())
}

fn check_scores(scores: &[f32], count: usize) -> Result<(), String> {
    if scores.len() != count {
        return Err(format!(
            "`tokenizer.ggml.scores`: expected one for each of {count} tokens, found {}",
            scores.len()
        ));
    }
    match scores.iter().position(|score| score.is_nan()) {
        None => Ok(()),
        Some(id) => Err(format!(
            "`tokenizer.ggml.scores`: expected numbers, found NaN for token {id}"
        )),
    }
}
