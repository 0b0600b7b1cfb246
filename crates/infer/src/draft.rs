//! State of speculative decoding per sequence: what the MTP module has read of the text, and what it has yet to read.

use burn::tensor::{Device, Tensor};
use model::{Cache, CacheType, ModelConfig, Mtp};

/// What drafting keeps of a text: the module's own cache, and the model's hidden states of the positions that the
/// module has not read. To read the last of these it needs the token after it, which is chosen in the next pass.
#[derive(Clone, Debug)]
pub(crate) struct DraftState {
    cache: Cache,
    /// `[1, n, hidden_size]` each, in the order of positions.
    pending: Vec<Tensor<3>>,
    /// Stands for a hidden state that is no longer held.
    unknown: Tensor<3>,
}

impl DraftState {
    pub(crate) fn new(config: &ModelConfig, cache_type: CacheType, device: &Device) -> Self {
        Self {
            cache: Mtp::cache(config, cache_type),
            pending: Vec::new(),
            unknown: Tensor::zeros([1, 1, config.hidden_size], device),
        }
    }

    /// The module's KV cache.
    pub(crate) fn cache(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// Positions that the module has not read.
    pub(crate) fn n_pending(&self) -> usize {
        self.pending.iter().map(|hidden| hidden.dims()[1]).sum()
    }

    /// Adds the hidden states of positions that the model has read, `[1, seq, hidden_size]`.
    pub(crate) fn push(&mut self, hidden: Tensor<3>) {
        self.pending.push(hidden);
    }

    /// Keeps the first `len` positions, or all if there are fewer. The module read the last of them together with a
    /// token that is gone, so it reads that position again. The hidden state may be gone too, which spoils at most one
    /// draft.
    pub(crate) fn truncate(&mut self, len: usize) {
        match len.checked_sub(self.cache.len()) {
            Some(0) | None => {
                self.cache.truncate(len.saturating_sub(1));
                self.pending.clear();
                self.pending.extend((len > 0).then(|| self.unknown.clone()));
            }
            Some(n) if n < self.n_pending() => {
                let first = self.take(n);
                self.pending = vec![first];
            }
            Some(_) => {}
        }
    }

    /// Removes and returns the hidden states of the first `n` pending positions, which the module reads next.
    pub(crate) fn take(&mut self, n: usize) -> Tensor<3> {
        let all = Tensor::cat(std::mem::take(&mut self.pending), 1);
        let [_, pending, _] = all.dims();
        if n < pending {
            self.pending.push(all.clone().slice([0..1, n..pending]));
        }
        all.slice([0..1, 0..n])
    }
}
