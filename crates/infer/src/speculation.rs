//! Speculative decoding with the model's module for multi-token prediction ([`model::Mtp`]).
//!
//! From the model's last hidden state the module drafts the token after the next one, and the model reads the next
//! token and the draft in one pass. If the sampler then chooses the drafted token, the same pass holds the logits after
//! it, so two tokens cost one pass.
//!
//! The chosen tokens and the number of random draws are the same as without drafts: a draft only adds a row to a pass,
//! the rows of a pass do not depend on each other, and a rejected draft is removed from the cache. The module never
//! reads a draft, so its own cache is of the text alone.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, sections 2.2 and 5.4.3.

use burn::tensor::{Int, Tensor, TensorData};
use kernels::MAX_GEMV_ROWS;
use kernels::device::read;
use model::{ForwardContext, Mtp};

use crate::engine::Engine;
use crate::sampler::argmax;
use crate::sequence::{Sequence, batch_by};

impl Engine {
    /// Drafts a token for each sequence that is about to decode, if all of them and their drafts fit the rows of one
    /// pass that computes each as if it were alone.
    pub(crate) fn draft(&self, sequences: &mut [&mut Sequence]) {
        let Some(mtp) = &self.mtp else { return };
        if 2 * sequences.len() > MAX_GEMV_ROWS {
            return;
        }
        let wanting = sequences.iter_mut().filter(|s| s.wants_draft());
        let mut wanting: Vec<&mut Sequence> = wanting.map(|s| &mut **s).collect();
        for batch in batch_by(&mut wanting, |s| (s.adapter_index(), s.n_pending())) {
            let model = self.model_of(batch[0]);
            let n = batch[0].n_pending();
            let hidden = self.read_pending(mtp, batch, n);
            let [n_sequences, _, width] = hidden.dims();
            let last = hidden.slice([0..n_sequences, n - 1..n]);
            let last = last.reshape([n_sequences, width]);
            let logits = mtp.logits(model, last, &ForwardContext::new(self.compute));
            let logits = read(logits);
            let rows = logits.chunks(self.model.config.vocab_size);
            for (sequence, logits) in batch.iter_mut().zip(rows) {
                // Without finite logits there is no draft.
                if let Some(id) = argmax(logits) {
                    sequence.set_draft(id as u32);
                }
            }
        }
    }

    /// Lets the module read all pending positions of a sequence except the last, if they are at least `min`.
    pub(crate) fn catch_up(&self, sequence: &mut Sequence, min: usize) {
        let n = sequence.n_pending().saturating_sub(1);
        if let Some(mtp) = &self.mtp
            && n >= min
        {
            self.read_pending(mtp, &mut [sequence], n);
        }
    }

    /// Lets the module read the first `n` pending positions of each sequence, all of one model. Returns its hidden
    /// states, `[batch, n, hidden_size]`.
    fn read_pending(&self, mtp: &Mtp, sequences: &mut [&mut Sequence], n: usize) -> Tensor<3> {
        let model = self.model_of(sequences[0]);
        let (mut next_ids, mut hidden) = (Vec::new(), Vec::new());
        for sequence in &mut *sequences {
            next_ids.extend(sequence.ids_after_pending(n).map(|id| id as i32));
            hidden.extend(sequence.draft_state().map(|state| state.take(n)));
        }
        let shape = [sequences.len(), n];
        let next_ids = Tensor::<2, Int>::from_data(TensorData::new(next_ids, shape), &self.device);
        let states = sequences.iter_mut().filter_map(|s| s.draft_state());
        let caches = states.map(|state| state.cache());
        let mut ctx = ForwardContext::cached(self.compute, caches);
        mtp.hidden(model, Tensor::cat(hidden, 0), next_ids, &mut ctx)
    }
}
