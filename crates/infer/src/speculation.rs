//! Guesses while decoding: a small module of the model says from its last hidden state what the token after the next may be
//! ([`model::Mtp`]), and the model reads the next token and that guess in one pass. If the sampler then chooses the guessed
//! token, the same pass has said what comes after it, so two tokens cost one pass.
//!
//! What is chosen, and how often random numbers are drawn, is what it is without guesses: a guess only decides what a pass
//! reads beside the next token, the rows of a pass do not depend on each other, and what was read in vain is forgotten.
//! The module never reads a guess, so its own cache is of the text alone.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, sections 2.2 and 5.4.3.

use burn::tensor::{Device, Int, Tensor, TensorData};
use model::{Cache, CacheType, ForwardContext, ModelConfig, Mtp};

use crate::engine::Engine;
use crate::sampler::argmax;
use crate::sequence::Sequence;

/// Rows up to which a product gives each of them what it gives it alone.
const ROWS: usize = 8;

/// What guessing keeps of a text: what the module has read of it, and the model's hidden states of the positions that it has
/// not read. For the last of these it needs a token that is still to be chosen.
#[derive(Clone, Debug)]
pub(crate) struct Lookahead {
    cache: Cache,
    /// `[1, n, hidden_size]` each, one after the other.
    waiting: Vec<Tensor<3>>,
    /// What stands for a hidden state that is not held any more.
    unknown: Tensor<3>,
}

impl Lookahead {
    pub(crate) fn new(config: &ModelConfig, cache_type: CacheType, device: &Device) -> Self {
        Self {
            cache: Mtp::cache(config, cache_type),
            waiting: Vec::new(),
            unknown: Tensor::zeros([1, 1, config.hidden_size], device),
        }
    }

    /// Positions that the module has not read.
    pub(crate) fn n_waiting(&self) -> usize {
        self.waiting.iter().map(|hidden| hidden.dims()[1]).sum()
    }

    /// Notes the hidden states of positions that the model has read, `[1, seq, hidden_size]`.
    pub(crate) fn push(&mut self, hidden: Tensor<3>) {
        self.waiting.push(hidden);
    }

    /// Forgets all but the first `len` positions, at most as many as there are. What the module read at the last of them was
    /// of the token after it, so it is to read that position again; its hidden state may be gone, which spoils a guess at
    /// most.
    pub(crate) fn truncate(&mut self, len: usize) {
        match len.checked_sub(self.cache.len()) {
            Some(0) | None => {
                self.cache.truncate(len.saturating_sub(1));
                self.waiting.clear();
                self.waiting.extend((len > 0).then(|| self.unknown.clone()));
            }
            Some(n) if n < self.n_waiting() => {
                let first = self.take(n);
                self.waiting = vec![first];
            }
            Some(_) => {}
        }
    }

    /// The hidden states of the first `n` positions that wait, which the module is about to read.
    fn take(&mut self, n: usize) -> Tensor<3> {
        let all = Tensor::cat(std::mem::take(&mut self.waiting), 1);
        let [_, waiting, _] = all.dims();
        if n < waiting {
            self.waiting.push(all.clone().slice([0..1, n..waiting]));
        }
        all.slice([0..1, 0..n])
    }
}

impl Engine {
    /// Guesses for sequences that are about to read a token, if so few that a pass over all of them and their guesses gives
    /// each what it would give it alone.
    pub(crate) fn guess(&self, sequences: &mut [&mut Sequence]) {
        let Some(mtp) = &self.mtp else { return };
        if 2 * sequences.len() > ROWS {
            return;
        }
        let wanting = sequences.iter_mut().filter(|s| s.wants_guess());
        let mut wanting: Vec<&mut Sequence> = wanting.map(|s| &mut **s).collect();
        for group in groups(&mut wanting, |s| (s.adapted(), s.n_waiting())) {
            let model = self.model_of(group[0]);
            let n = group[0].n_waiting();
            let hidden = self.look_ahead(mtp, group, n);
            let [batch, _, width] = hidden.dims();
            let last = hidden.slice([0..batch, n - 1..n]).reshape([batch, width]);
            let logits = mtp.logits(model, last, &ForwardContext::new(self.compute));
            let logits: Vec<f32> = logits.into_data().try_to_vec().expect("logits are f32");
            let rows = logits.chunks(self.model.config.vocab_size);
            for (sequence, logits) in group.iter_mut().zip(rows) {
                // A module that makes no numbers makes no guesses.
                if let Some(id) = argmax(logits) {
                    sequence.guess(id as u32);
                }
            }
        }
    }

    /// Lets the module read what waits of a text but the last position, if that is more than `limit`.
    pub(crate) fn catch_up(&self, sequence: &mut Sequence, limit: usize) {
        let n = sequence.n_waiting().saturating_sub(1);
        if let Some(mtp) = &self.mtp
            && n >= limit
        {
            self.look_ahead(mtp, &mut [sequence], n);
        }
    }

    /// Lets the module read the first `n` positions that wait in each of some texts of one model. Returns its hidden states, `[batch, n,
    /// hidden_size]`.
    fn look_ahead(&self, mtp: &Mtp, sequences: &mut [&mut Sequence], n: usize) -> Tensor<3> {
        let model = self.model_of(sequences[0]);
        let (mut next_ids, mut hidden) = (Vec::new(), Vec::new());
        for sequence in &mut *sequences {
            next_ids.extend(sequence.ids_after_waiting(n).map(|id| id as i32));
            hidden.extend(sequence.lookahead().map(|lookahead| lookahead.take(n)));
        }
        let shape = [sequences.len(), n];
        let next_ids = Tensor::<2, Int>::from_data(TensorData::new(next_ids, shape), &self.device);
        let lookaheads = sequences.iter_mut().filter_map(|s| s.lookahead());
        let caches = lookaheads.map(|lookahead| &mut lookahead.cache);
        let mut ctx = ForwardContext::cached(self.compute, caches);
        mtp.hidden(model, Tensor::cat(hidden, 0), next_ids, &mut ctx)
    }
}

/// Sequences in groups that have something in common.
pub(crate) fn groups<'a, 's, K: Ord>(
    sequences: &'a mut [&'s mut Sequence],
    of: impl Fn(&Sequence) -> K + Copy,
) -> impl Iterator<Item = &'a mut [&'s mut Sequence]> {
    sequences.sort_by_key(|sequence| of(sequence));
    sequences.chunk_by_mut(move |a, b| of(a) == of(b))
}
