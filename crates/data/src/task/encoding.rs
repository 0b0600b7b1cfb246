//! The tokens of requests, cut between context and continuation as the harness cuts them.
//!
//! Spaces at the end of a context are the beginning of the continuation; whole and context are encoded apart, and what the whole
//! has more is the continuation. That is not always what the ranges of characters in [`crate::Sample`] say.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/api/model.py, `_encode_pair`; lm_eval/utils.py,
//! `get_rolling_token_windows`.

use crate::jinja::is_space;
use crate::tokenizer::{Bos, Tokenizer};
use crate::{Error, Result};

/// Token ids of which the last ones are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoredTokens {
    /// The whole sequence.
    pub ids: Vec<u32>,
    /// How many of the last ones are scored.
    pub n_scored: usize,
    /// How many tokens were cut off from its beginning.
    pub n_cut: usize,
}

/// Encodes requests for a model.
#[derive(Clone, Copy, Debug)]
pub struct TaskEncoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that the model can read.
    max_length: usize,
    /// What the first token of a text follows.
    prefix: u32,
}

impl<'a> TaskEncoder<'a> {
    /// For a model that can read `max_length` tokens.
    ///
    /// # Errors
    /// If the tokenizer has no token that begins or ends a text.
    pub fn new(tokenizer: &'a Tokenizer, max_length: usize) -> Result<Self> {
        let prefix = tokenizer.bos_id().or(tokenizer.eos_id());
        Ok(Self {
            tokenizer,
            max_length,
            prefix: prefix.ok_or_else(|| {
                Error::schema("a tokenizer with a BOS or an EOS token", "neither")
            })?,
        })
    }

    /// A continuation of which every token is scored, after a context.
    ///
    /// # Errors
    /// If there is no token to score, or more than the model can read.
    pub fn pair(&self, context: &str, continuation: &str) -> Result<ScoredTokens> {
        let (mut ids, scored) = if context.is_empty() {
            let scored = self.tokenizer.encode(continuation, Bos::Never)?;
            match scored.split_first() {
                Some((first, rest)) if *first == self.prefix => (vec![*first], rest.to_vec()),
                _ => (vec![self.prefix], scored),
            }
        } else {
            let whole = format!("{context}{continuation}");
            let whole = self.tokenizer.encode(&whole, Bos::Add)?;
            let context = context.trim_end_matches(is_space);
            let context = self.tokenizer.encode(context, Bos::Add)?;
            let scored = whole.get(context.len()..).unwrap_or_default().to_vec();
            (context, scored)
        };
        let n_scored = scored.len();
        if ids.is_empty() || !(1..=self.max_length).contains(&n_scored) {
            let expected = format!(
                "1 to {} tokens to score, with at least one before them,",
                self.max_length
            );
            return Err(Error::schema(
                expected,
                format!("{n_scored} after {}", ids.len()),
            ));
        }
        ids.extend(scored);
        // The last token is not read.
        let n_cut = ids.len().saturating_sub(self.max_length + 1);
        Ok(ScoredTokens {
            ids: ids.split_off(n_cut),
            n_scored,
            n_cut,
        })
    }

    /// A whole text, every token of which is scored once: in windows that the model can read. Each window but the first begins with
    /// tokens that the one before has scored, at least one.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn windows(&self, text: &str) -> Result<Vec<ScoredTokens>> {
        let ids = self.tokenizer.encode(text, Bos::Add)?;
        let window = |before: &[u32], scored: &[u32]| ScoredTokens {
            ids: [before, scored].concat(),
            n_scored: scored.len(),
            n_cut: 0,
        };
        let first = ids.len().min(self.max_length);
        let mut windows = Vec::new();
        if first > 0 {
            windows.push(window(&[self.prefix], &ids[..first]));
        }
        let mut done = first;
        while done < ids.len() {
            // A window is as long as it can be: what it does not score is its context.
            let end = ids.len().min(done + self.max_length);
            let start = end.saturating_sub(self.max_length + 1);
            windows.push(window(&ids[start..done], &ids[done..end]));
            done = end;
        }
        Ok(windows)
    }

    /// The prompt of an answer of up to `max_tokens`, truncated at its beginning to fit the model with it. Returns the number of
    /// truncated tokens too.
    ///
    /// # Errors
    /// If there is no room for any text, or no token in it.
    pub fn prompt(&self, text: &str, max_tokens: usize) -> Result<(Vec<u32>, usize)> {
        let mut ids = self.tokenizer.encode(text, Bos::Add)?;
        let room = self.max_length.saturating_sub(max_tokens);
        if room == 0 || ids.is_empty() {
            let expected = format!("a prompt, and room for it next to {max_tokens} new tokens,");
            let found = format!(
                "{} tokens for a model that reads {}",
                ids.len(),
                self.max_length
            );
            return Err(Error::schema(expected, found));
        }
        let n_cut = ids.len().saturating_sub(room);
        Ok((ids.split_off(n_cut), n_cut))
    }
}
