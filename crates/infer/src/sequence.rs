//! One text that is being continued: what the model has read of it, what it is to read next, and what it wrote.

use burn::tensor::{Device, Tensor};
use model::{Cache, CacheType, Model};

use crate::error::{Error, Result};
use crate::sampler::{SampleConfig, Sampler};
use crate::speculation::Lookahead;

/// How a prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Most new tokens.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sample: SampleConfig,
    /// Tokens that end the text; see [`crate::end_of_text_ids`].
    pub stop_ids: Vec<u32>,
    /// Note what the model thought of every new token, and so many of the likeliest in its place.
    pub logprobs: Option<usize>,
}

/// What came after a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens, without the one that ended the text.
    pub token_ids: Vec<u32>,
    /// What the model thought of each, if that was asked for.
    pub logprobs: Vec<Logprobs>,
    /// Why there are no more.
    pub stopped: Stop,
    /// Tokens of the prompt that had to be read: all but those that a [`Context`] held.
    pub prefill_tokens: usize,
    /// Seconds that reading them took, the choice of the first token included.
    pub prefill_secs: f64,
    /// Seconds that the passes after it took, the choice of tokens included.
    pub decode_secs: f64,
    /// How many tokens were chosen in them, one that ended the text included.
    pub decode_steps: usize,
    /// How many of these were guessed before; see [`Engine::mtp`](crate::Engine).
    pub guessed: usize,
    /// How many of the guesses were right. Each but one that ends the text saves a pass.
    pub guessed_right: usize,
}

/// How probable the model found a token and the likeliest ones in its place: logarithms of the softmax of its logits, in
/// nats, before anything of the sampler changes them.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f64,
    /// The likeliest tokens, the likeliest first; of equals the lower id first.
    pub top: Vec<(u32, f64)>,
}

impl Logprobs {
    /// Of some finite logits, `[vocab]`.
    fn new(logits: &[f32], chosen: u32, n_top: usize) -> Self {
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
pub enum Stop {
    /// The model chose this token, which ends a text.
    EndOfText(u32),
    /// As many tokens as were asked for.
    MaxTokens,
    /// The caller wanted no more.
    Caller,
}

/// Tokens that a model has read, and what attention keeps of them: where the next prompt begins with the same tokens, as
/// in a conversation, only what follows is read.
#[derive(Clone, Debug)]
pub struct Context {
    token_ids: Vec<u32>,
    cache: Cache,
    lookahead: Option<Lookahead>,
    /// Which of the adapted models read it; none for the model itself.
    adapted: Option<usize>,
}

/// A text that is being continued, from its prompt to its end.
#[derive(Clone, Debug)]
pub struct Sequence {
    context: Context,
    /// What the model has not read: the rest of the prompt, or the token chosen last.
    unread: Vec<u32>,
    /// What the next pass reads after it, to have been right or wrong.
    guess: Option<u32>,
    /// Where a guess was right: the logits after it, `[vocab]`. The model has then read what is `unread`.
    ahead: Option<Vec<f32>>,
    sampler: Sampler,
    config: GenerateConfig,
    stopped: Option<Stop>,
    new_token: Option<u32>,
    /// Its `stopped` is of no meaning before there is one.
    generation: Generation,
}

impl Context {
    /// Nothing read yet.
    pub fn new(model: &Model, cache_type: CacheType) -> Self {
        Self {
            token_ids: Vec::new(),
            cache: Cache::new(&model.config, cache_type),
            lookahead: None,
            adapted: None,
        }
    }

    /// As one of the adapted models reads it.
    pub(crate) fn of_adapted(self, number: usize) -> Self {
        Self {
            adapted: Some(number),
            ..self
        }
    }

    /// Nothing read yet, of texts that a module guesses ahead.
    pub(crate) fn guessed_ahead(model: &Model, cache_type: CacheType, device: &Device) -> Self {
        Self {
            lookahead: Some(Lookahead::new(&model.config, cache_type, device)),
            ..Self::new(model, cache_type)
        }
    }

    /// What was read.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Forgets all that is not how `prompt` begins, and its last token too, which has to be read for what comes next.
    /// Returns how many tokens are left.
    fn rewind(&mut self, prompt: &[u32]) -> usize {
        let pairs = self.token_ids.iter().zip(prompt);
        let common = pairs.take_while(|(read, id)| read == id).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        self.token_ids.truncate(kept);
        self.forget_unknown();
        kept
    }

    /// Forgets what attention keeps of tokens that are not here.
    fn forget_unknown(&mut self) {
        self.cache.truncate(self.token_ids.len());
        if let Some(lookahead) = &mut self.lookahead {
            lookahead.truncate(self.token_ids.len());
        }
    }
}

impl Sequence {
    /// A text that begins with `prompt`, of which a context may have read the beginning.
    ///
    /// # Errors
    /// If the prompt is empty, holds an id the model does not know, or leaves no room for `max_tokens`; or if a setting
    /// of the sampler has no meaning.
    pub fn new(
        model: &Model,
        mut context: Context,
        prompt: &[u32],
        config: &GenerateConfig,
    ) -> Result<Self> {
        check(model, prompt, config.max_tokens)?;
        let sampler = Sampler::new(config.sample)?;
        let unread = prompt[context.rewind(prompt)..].to_vec();
        Ok(Self {
            context,
            guess: None,
            ahead: None,
            sampler,
            config: config.clone(),
            stopped: (config.max_tokens == 0).then_some(Stop::MaxTokens),
            new_token: None,
            generation: Generation {
                token_ids: Vec::new(),
                logprobs: Vec::new(),
                stopped: Stop::MaxTokens,
                prefill_tokens: unread.len(),
                prefill_secs: 0.0,
                decode_secs: 0.0,
                decode_steps: 0,
                guessed: 0,
                guessed_right: 0,
            },
            unread,
        })
    }

    /// What was written so far.
    pub fn token_ids(&self) -> &[u32] {
        &self.generation.token_ids
    }

    /// The token that the last step added to the text, if it added one.
    pub fn new_token(&self) -> Option<u32> {
        self.new_token
    }

    /// Why the text has ended, if it has.
    pub fn stopped(&self) -> Option<Stop> {
        self.stopped
    }

    /// Tokens of the prompt that are not read yet; 0 once the first token is chosen.
    pub fn unread_tokens(&self) -> usize {
        if self.is_decoding() {
            0
        } else {
            self.unread.len()
        }
    }

    /// Ends the text.
    pub fn stop(&mut self) {
        self.stopped.get_or_insert(Stop::Caller);
    }

    /// What was written, and what was read for it, with which a longer prompt may begin.
    pub fn finish(mut self) -> (Generation, Context) {
        if self.is_ahead() {
            // The last token is not read, guessed or not: what follows a text does not depend on guesses.
            self.context.forget_unknown();
        }
        let stopped = self.stopped.unwrap_or(Stop::Caller);
        let generation = Generation {
            stopped,
            ..self.generation
        };
        (generation, self.context)
    }

    /// Which of the adapted models it is of, if it is of one.
    pub(crate) fn adapted(&self) -> Option<usize> {
        self.context.adapted
    }

    /// Whether its next pass reads a token that the model wrote.
    pub(crate) fn is_decoding(&self) -> bool {
        !self.generation.token_ids.is_empty()
    }

    /// Whether there is something left to do in a step.
    pub(crate) fn begin_step(&mut self) -> bool {
        let is_running = self.stopped.is_none();
        if is_running {
            self.new_token = None;
        }
        is_running
    }

    /// Whether its next token needs no pass.
    pub(crate) fn is_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// What is noted of it.
    pub(crate) fn generation(&mut self) -> &mut Generation {
        &mut self.generation
    }

    /// What is to be read, a guess included.
    pub(crate) fn n_unread(&self) -> usize {
        self.unread.len() + usize::from(self.guess.is_some())
    }

    /// Ids for the next pass, at most so many, and a guess.
    pub(crate) fn next_ids(&self, limit: usize) -> impl Iterator<Item = u32> {
        let unread = &self.unread[..self.unread.len().min(limit)];
        unread.iter().copied().chain(self.guess)
    }

    /// Of how many of the next `n` ids, the last ones, it wants the logits. A piece of a prompt that is not its last chooses
    /// nothing.
    pub(crate) fn n_choices(&self, n: usize) -> usize {
        if n < self.n_unread() {
            return 0;
        }
        1 + usize::from(self.guess.is_some())
    }

    /// What attention keeps of it.
    pub(crate) fn cache(&mut self) -> &mut Cache {
        &mut self.context.cache
    }

    /// What guessing keeps of it, if it is guessed ahead.
    pub(crate) fn lookahead(&mut self) -> Option<&mut Lookahead> {
        self.context.lookahead.as_mut()
    }

    /// Positions that a module which guesses is still to read.
    pub(crate) fn n_waiting(&self) -> usize {
        let lookahead = self.context.lookahead.as_ref();
        lookahead.map_or(0, Lookahead::n_waiting)
    }

    /// The tokens after each of the first `n` positions that wait for the module.
    pub(crate) fn ids_after_waiting(&self, n: usize) -> impl Iterator<Item = u32> {
        let text = self.context.token_ids.iter().chain(&self.unread).copied();
        text.skip(self.context.token_ids.len() - self.n_waiting() + 1)
            .take(n)
    }

    /// Whether a guess may save a pass: not of the last token.
    pub(crate) fn wants_guess(&self) -> bool {
        let n_left = self.config.max_tokens - self.generation.token_ids.len();
        self.context.lookahead.is_some() && n_left > 1
    }

    /// Has the next pass read a guess too.
    pub(crate) fn guess(&mut self, id: u32) {
        self.guess = Some(id);
        self.generation.guessed += 1;
    }

    /// Notes a pass over the next `n` ids, which may have left hidden states `[1, n, hidden_size]`, and chooses a token by the
    /// first of its logits, `[n_choices, vocab]`, if there are some.
    ///
    /// # Errors
    /// If the logits are not finite.
    pub(crate) fn advance(
        &mut self,
        n: usize,
        logits: &[f32],
        hidden: Option<Tensor<3>>,
    ) -> Result<()> {
        let guess = self.guess.take();
        let n_known = n - usize::from(guess.is_some());
        self.context.token_ids.extend(self.unread.drain(..n_known));
        match (&mut self.context.lookahead, hidden) {
            (Some(lookahead), Some(hidden)) => lookahead.push(hidden),
            (lookahead, _) => *lookahead = None,
        }
        if logits.is_empty() {
            return Ok(());
        }
        let (first, second) = logits.split_at(logits.len() / (1 + n - n_known));
        let chosen = self.choose(first)?;
        let Some(guess) = guess else { return Ok(()) };
        self.generation.guessed_right += usize::from(guess == chosen);
        if guess == chosen && self.stopped.is_none() {
            self.ahead = Some(second.to_vec());
        } else {
            self.context.forget_unknown();
        }
        Ok(())
    }

    /// Chooses the token after one that was guessed and read.
    ///
    /// # Errors
    /// If the logits are not finite.
    pub(crate) fn choose_ahead(&mut self) -> Result<()> {
        if let Some(logits) = self.ahead.take() {
            self.context.token_ids.append(&mut self.unread);
            self.choose(&logits)?;
        }
        Ok(())
    }

    /// Chooses the next token by its logits, `[vocab]`.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let step = self.generation.token_ids.len();
        self.generation.decode_steps += usize::from(self.is_decoding());
        let id = self.sampler.sample(logits, &self.context.token_ids);
        let id = id.ok_or(Error::NotFinite { step })?;
        self.add(id, logits);
        Ok(id)
    }

    /// Goes on with a token that was chosen by some logits, or ends with it.
    fn add(&mut self, id: u32, logits: &[f32]) {
        if self.config.stop_ids.contains(&id) {
            self.stopped = Some(Stop::EndOfText(id));
            return;
        }
        self.unread.push(id);
        self.new_token = Some(id);
        self.generation.token_ids.push(id);
        let logprobs = self.config.logprobs.map(|n| Logprobs::new(logits, id, n));
        self.generation.logprobs.extend(logprobs);
        if self.generation.token_ids.len() == self.config.max_tokens {
            self.stopped = Some(Stop::MaxTokens);
        }
    }
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
