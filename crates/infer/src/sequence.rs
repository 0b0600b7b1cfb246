//! One text in progress: what the model has read of it, what it reads next, and what it has written.

use burn::tensor::{Device, Tensor};
use model::{Cache, CacheType, Model};

use crate::draft::DraftState;
use crate::error::{Error, Result};
use crate::sample_config::SampleConfig;
use crate::sampler::Sampler;

/// How a prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Maximum number of new tokens.
    pub max_tokens: usize,
    /// How each token is sampled.
    pub sample: SampleConfig,
    /// Tokens that end the text; see [`crate::end_of_text`].
    pub stop_ids: Vec<u32>,
    /// Record the log-probability of every new token, and of this many most likely tokens in its place.
    pub logprobs: Option<usize>,
}

/// The continuation of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens, without the one that ended the text.
    pub token_ids: Vec<u32>,
    /// Log-probabilities of each new token, if [`GenerateConfig::logprobs`] asks for them.
    pub logprobs: Vec<Logprobs>,
    /// Why the text ended.
    pub finish_reason: FinishReason,
    /// Prompt tokens that the model read: all except those in the [`KvPrefix`].
    pub prefill_tokens: usize,
    /// Seconds to read them and to choose the first token.
    pub prefill_secs: f64,
    /// Seconds of all later passes, sampling included.
    pub decode_secs: f64,
    /// Tokens chosen in those passes, including one that ended the text.
    pub decode_steps: usize,
    /// Tokens drafted by speculative decoding; see [`Engine::mtp`](crate::Engine).
    pub drafted: usize,
    /// Drafted tokens that the sampler then chose. Each saves a pass, except one that ends the text.
    pub accepted: usize,
}

/// Log-probabilities of a new token and of the most likely tokens in its place: logarithms of the softmax of the
/// logits, in nats, before the sampler changes them.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f64,
    /// The most likely tokens in descending order; ties go to the lower id.
    pub top: Vec<(u32, f64)>,
}

impl Logprobs {
    /// From finite logits, `[vocab]`.
    pub(crate) fn new(logits: &[f32], chosen: u32, n_top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let above = |logit: f32| f64::from(logit) - f64::from(largest);
        let sum: f64 = logits.iter().map(|logit| above(*logit).exp()).sum();
        let of = |id: u32| above(logits[id as usize]) - sum.ln();
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| {
            let [left, right] = [*a, *b].map(|id| logits[id as usize]);
            right.total_cmp(&left).then(a.cmp(b))
        };
        if n_top < ids.len() {
            ids.select_nth_unstable_by(n_top, likelier);
            ids.truncate(n_top);
        }
        ids.sort_unstable_by(likelier);
        Self {
            chosen: of(chosen),
            top: ids.into_iter().map(|id| (id, of(id))).collect(),
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose this token, which ends a text.
    EndOfText(u32),
    /// The text reached a stop string.
    StopString,
    /// The text has [`GenerateConfig::max_tokens`] tokens.
    Length,
    /// The caller ended it.
    Cancelled,
}

impl FinishReason {
    /// The name in OpenAI's API; `cancelled`, which that API does not have, if the caller ended the text.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndOfText(_) | Self::StopString => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Tokens that a model has read, and their KV cache. If the next prompt begins with the same tokens, as in a
/// conversation, the model reads only what follows.
#[derive(Clone, Debug)]
pub struct KvPrefix {
    token_ids: Vec<u32>,
    cache: Cache,
    draft_state: Option<DraftState>,
    /// The adapter that the tokens were read with; none for the model without one.
    adapter_index: Option<usize>,
}

/// A text that is being continued, from its prompt to its end.
#[derive(Clone, Debug)]
pub struct Sequence {
    prefix: KvPrefix,
    /// Tokens the model has not read: the rest of the prompt, or the last chosen token.
    unread: Vec<u32>,
    /// The drafted token that the next pass reads after them.
    draft: Option<u32>,
    /// Logits after an accepted draft, `[vocab]`. The model has then read `unread`.
    verified_logits: Option<Vec<f32>>,
    sampler: Sampler,
    config: GenerateConfig,
    finish_reason: Option<FinishReason>,
    new_token: Option<u32>,
    /// Its `finish_reason` has no meaning before the sequence has one.
    generation: Generation,
}

impl KvPrefix {
    /// An empty prefix, for sequences without speculative decoding.
    pub fn new(model: &Model, cache_type: CacheType) -> Self {
        Self {
            token_ids: Vec::new(),
            cache: Cache::new(&model.config, cache_type),
            draft_state: None,
            adapter_index: None,
        }
    }

    /// The prefix as read with one of the engine's adapters.
    pub(crate) fn with_adapter(self, adapter_index: usize) -> Self {
        Self {
            adapter_index: Some(adapter_index),
            ..self
        }
    }

    /// An empty prefix, for sequences with speculative decoding.
    pub(crate) fn with_draft_state(model: &Model, cache_type: CacheType, device: &Device) -> Self {
        Self {
            draft_state: Some(DraftState::new(&model.config, cache_type, device)),
            ..Self::new(model, cache_type)
        }
    }

    /// The tokens that were read.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Keeps the tokens that `prompt` begins with, except its last token, which the model has to read for the next
    /// logits. Returns the number of tokens kept.
    fn rewind(&mut self, prompt: &[u32]) -> usize {
        let pairs = self.token_ids.iter().zip(prompt);
        let common = pairs.take_while(|(read, id)| read == id).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        self.token_ids.truncate(kept);
        self.truncate_caches();
        kept
    }

    /// Removes tokens from the caches that are not in `token_ids`.
    fn truncate_caches(&mut self) {
        self.cache.truncate(self.token_ids.len());
        if let Some(draft_state) = &mut self.draft_state {
            draft_state.truncate(self.token_ids.len());
        }
    }
}

impl Sequence {
    /// A text that begins with `prompt`. The prefix may hold its beginning.
    ///
    /// # Errors
    /// If the prompt is empty, holds an unknown id, or leaves no room for `max_tokens`; or if a setting of the sampler
    /// is out of range.
    pub fn new(
        model: &Model,
        mut prefix: KvPrefix,
        prompt: &[u32],
        config: &GenerateConfig,
    ) -> Result<Self> {
        check(model, prompt, config.max_tokens)?;
        let sampler = Sampler::new(config.sample)?;
        let unread = prompt[prefix.rewind(prompt)..].to_vec();
        Ok(Self {
            prefix,
            draft: None,
            verified_logits: None,
            sampler,
            config: config.clone(),
            finish_reason: (config.max_tokens == 0).then_some(FinishReason::Length),
            new_token: None,
            generation: Generation {
                token_ids: Vec::new(),
                logprobs: Vec::new(),
                finish_reason: FinishReason::Length,
                prefill_tokens: unread.len(),
                prefill_secs: 0.0,
                decode_secs: 0.0,
                decode_steps: 0,
                drafted: 0,
                accepted: 0,
            },
            unread,
        })
    }

    /// The tokens written so far.
    pub fn token_ids(&self) -> &[u32] {
        &self.generation.token_ids
    }

    /// The token that the last step added to the text, if it added one.
    pub fn new_token(&self) -> Option<u32> {
        self.new_token
    }

    /// Why the text has ended, if it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// Prompt tokens that are not read yet; 0 once the first token is chosen.
    pub fn unread_tokens(&self) -> usize {
        if self.is_decoding() {
            0
        } else {
            self.unread.len()
        }
    }

    /// Ends the text, if it has not ended.
    pub fn stop(&mut self) {
        self.finish_reason.get_or_insert(FinishReason::Cancelled);
    }

    /// Ends the text at a stop string.
    pub(crate) fn end_at_stop_string(&mut self) {
        self.finish_reason.get_or_insert(FinishReason::StopString);
    }

    /// The continuation, and the prefix that a longer prompt may begin with.
    pub fn finish(mut self) -> (Generation, KvPrefix) {
        if self.has_verified_logits() {
            // The last token counts as unread, drafted or not: what follows a text does not depend on drafts.
            self.prefix.truncate_caches();
        }
        let finish_reason = self.finish_reason.unwrap_or(FinishReason::Cancelled);
        let generation = Generation {
            finish_reason,
            ..self.generation
        };
        (generation, self.prefix)
    }

    /// The adapter of the sequence, by its index in the engine; none for the model without one.
    pub(crate) fn adapter_index(&self) -> Option<usize> {
        self.prefix.adapter_index
    }

    /// Whether the next pass reads a token that the model wrote.
    pub(crate) fn is_decoding(&self) -> bool {
        !self.generation.token_ids.is_empty()
    }

    /// Prepares for a step. Returns false if the text has ended.
    pub(crate) fn begin_step(&mut self) -> bool {
        let is_running = self.finish_reason.is_none();
        if is_running {
            self.new_token = None;
        }
        is_running
    }

    /// Whether the next token can be chosen without a pass.
    pub(crate) fn has_verified_logits(&self) -> bool {
        self.verified_logits.is_some()
    }

    /// The record of the continuation so far.
    pub(crate) fn generation(&mut self) -> &mut Generation {
        &mut self.generation
    }

    /// Tokens to read, including a draft.
    pub(crate) fn n_unread(&self) -> usize {
        self.unread.len() + usize::from(self.draft.is_some())
    }

    /// Ids for the next pass: at most `limit` unread ones, and the draft.
    pub(crate) fn next_ids(&self, limit: usize) -> impl Iterator<Item = u32> {
        let unread = &self.unread[..self.unread.len().min(limit)];
        unread.iter().copied().chain(self.draft)
    }

    /// How many of the last of the next `n` ids need logits. A chunk of a prompt that is not the last one needs none.
    pub(crate) fn n_choices(&self, n: usize) -> usize {
        if n < self.n_unread() {
            return 0;
        }
        1 + usize::from(self.draft.is_some())
    }

    /// The KV cache.
    pub(crate) fn cache(&mut self) -> &mut Cache {
        &mut self.prefix.cache
    }

    /// The state of drafting, if the sequence has one.
    pub(crate) fn draft_state(&mut self) -> Option<&mut DraftState> {
        self.prefix.draft_state.as_mut()
    }

    /// Positions that the drafting module has not read.
    pub(crate) fn n_pending(&self) -> usize {
        let draft_state = self.prefix.draft_state.as_ref();
        draft_state.map_or(0, DraftState::n_pending)
    }

    /// The token after each of the first `n` pending positions.
    pub(crate) fn ids_after_pending(&self, n: usize) -> impl Iterator<Item = u32> {
        let text = self.prefix.token_ids.iter().chain(&self.unread).copied();
        text.skip(self.prefix.token_ids.len() - self.n_pending() + 1)
            .take(n)
    }

    /// Whether a draft may save a pass. A draft of the last token cannot.
    pub(crate) fn wants_draft(&self) -> bool {
        let n_left = self.config.max_tokens - self.generation.token_ids.len();
        self.prefix.draft_state.is_some() && n_left > 1
    }

    /// Adds a draft to the next pass.
    pub(crate) fn set_draft(&mut self, id: u32) {
        self.draft = Some(id);
        self.generation.drafted += 1;
    }

    /// Records a pass over the next `n` ids and its hidden states `[1, n, hidden_size]`, if drafting needs them.
    /// Chooses a token by the first row of the logits, `[n_choices, vocab]`, if there are any.
    ///
    /// # Errors
    /// If the logits are not finite.
    pub(crate) fn advance(
        &mut self,
        n: usize,
        logits: &[f32],
        hidden: Option<Tensor<3>>,
    ) -> Result<()> {
        let draft = self.draft.take();
        let n_known = n - usize::from(draft.is_some());
        self.prefix.token_ids.extend(self.unread.drain(..n_known));
        match (&mut self.prefix.draft_state, hidden) {
            (Some(draft_state), Some(hidden)) => draft_state.push(hidden),
            (draft_state, _) => *draft_state = None,
        }
        if logits.is_empty() {
            return Ok(());
        }
        let (first, second) = logits.split_at(logits.len() / (1 + n - n_known));
        let chosen = self.choose(first)?;
        let Some(draft) = draft else { return Ok(()) };
        self.generation.accepted += usize::from(draft == chosen);
        if draft == chosen && self.finish_reason.is_none() {
            self.verified_logits = Some(second.to_vec());
        } else {
            self.prefix.truncate_caches();
        }
        Ok(())
    }

    /// Chooses the token after an accepted draft.
    ///
    /// # Errors
    /// If the logits are not finite.
    pub(crate) fn choose_verified(&mut self) -> Result<()> {
        if let Some(logits) = self.verified_logits.take() {
            self.prefix.token_ids.append(&mut self.unread);
            self.choose(&logits)?;
        }
        Ok(())
    }

    /// Chooses the next token by its logits, `[vocab]`.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let step = self.generation.token_ids.len();
        self.generation.decode_steps += usize::from(self.is_decoding());
        let id = self.sampler.sample(logits, &self.prefix.token_ids);
        let id = id.ok_or(Error::NotFinite { step })?;
        self.add(id, logits);
        Ok(id)
    }

    /// Adds a token chosen by these logits to the text, or ends the text with it.
    fn add(&mut self, id: u32, logits: &[f32]) {
        if self.config.stop_ids.contains(&id) {
            self.finish_reason = Some(FinishReason::EndOfText(id));
            return;
        }
        self.unread.push(id);
        self.new_token = Some(id);
        self.generation.token_ids.push(id);
        let logprobs = self.config.logprobs.map(|n| Logprobs::new(logits, id, n));
        self.generation.logprobs.extend(logprobs);
        if self.generation.token_ids.len() == self.config.max_tokens {
            self.finish_reason = Some(FinishReason::Length);
        }
    }
}

/// Sequences in batches that have a key in common.
pub(crate) fn batch_by<'a, 's, K: Ord>(
    sequences: &'a mut [&'s mut Sequence],
    key: impl Fn(&Sequence) -> K + Copy,
) -> impl Iterator<Item = &'a mut [&'s mut Sequence]> {
    sequences.sort_by_key(|sequence| key(sequence));
    sequences.chunk_by_mut(move |a, b| key(a) == key(b))
}

fn check(model: &Model, prompt: &[u32], max_tokens: usize) -> Result<()> {
    let (vocab_size, limit) = (
        model.config.vocab_size,
        model.config.max_position_embeddings,
    );
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    if let Some(position) = prompt.iter().position(|id| *id as usize >= vocab_size) {
        let id = prompt[position];
        return Err(Error::Vocabulary {
            position,
            id,
            vocab_size,
        });
    }
    if prompt.len().saturating_add(max_tokens) > limit {
        return Err(Error::ContextLength {
            prompt: prompt.len(),
            max_tokens,
            limit,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        // 0.1, 0.2, 0.3, 0.2, 0.2 and 0, all times e^5.
        let shares = [1.0f64, 2.0, 3.0, 2.0, 2.0, 0.0];
        let logits = shares.map(|share| share.ln() as f32 + 5.0);
        let found = Logprobs::new(&logits, 0, 3);
        assert!((found.chosen - 0.1f64.ln()).abs() < 1e-6, "{found:?}");
        for ((id, logprob), (expected, share)) in
            found.top.iter().zip([(2, 0.3f64), (1, 0.2), (3, 0.2)])
        {
            assert!(
                *id == expected && (logprob - share.ln()).abs() < 1e-6,
                "{found:?}"
            );
        }
        assert_eq!(found.top.len(), 3);
        assert!(Logprobs::new(&logits, 2, 0).top.is_empty());
        let all = Logprobs::new(&logits, 2, 99).top;
        assert_eq!((all.len(), all[5]), (6, (5, f64::NEG_INFINITY)));
    }
}
