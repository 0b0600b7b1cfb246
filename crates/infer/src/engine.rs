//! The forward passes of generation: prompts in chunks, then one token of every sequence at a time.
//!
//! Sequences join a step when they are passed to it and leave when they have ended: nothing is padded, and no sequence
//! waits for another to end. Each sequence gets the result it gets alone: prompts are read one by one, and in the
//! products of a decode step every sequence has a row of its own. With more than 8 rows, products sum in another order,
//! so logits differ by rounding from those of fewer rows.
//!
//! With speculative decoding (see `speculation.rs`) a pass may yield two tokens of a sequence. The second is chosen in
//! a step of its own that needs no pass. Other sequences wait for that step, so that all share the next pass.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use kernels::{ExpertCache, FileAccess};
use model::{CacheType, Compute, ForwardContext, Model, Mtp, Training, load};

use crate::error::Result;
use crate::logits::read_logits;
use crate::repack::{EngineWeights, RepackSchedule};
use crate::sequence::{GenerateConfig, Generation, KvPrefix, Sequence, batch_by};

/// Prompt tokens per pass. Attention scores of a chunk are `[heads, CHUNK, kv_seq]`, so memory grows linearly with the
/// length of the prompt and not with its square. Products with this many rows run at full speed.
pub const CHUNK: usize = 512;

/// A model that continues prompts.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The model, with its adapter if it has one.
    pub model: Model,
    /// The model with other adapters, one per adapter index.
    pub(crate) adapted_models: Vec<Model>,
    /// The module that drafts tokens for speculative decoding; none for one token per pass.
    pub mtp: Option<Mtp>,
    /// How products treat their operands: activations quantized, or the rounding of a training run.
    pub compute: Compute,
    /// Data type of the KV cache.
    pub cache: CacheType,
    /// The device that computes.
    pub device: Device,
    pub(crate) schedule: RepackSchedule,
}

impl Engine {
    /// A frozen model from its folder, without an adapter, with a KV cache in f32.
    ///
    /// # Errors
    /// If the folder cannot be read or holds no supported model.
    pub fn open(folder: &Path, compute: impl Into<Compute>, device: Device) -> Result<Self> {
        let model = load::load(&Folder::open(folder)?, Training::Frozen, &device)?;
        Ok(Self::new(model, compute, device))
    }

    /// An engine without further adapters, speculative decoding or repacking.
    pub fn new(model: Model, compute: impl Into<Compute>, device: Device) -> Self {
        Self {
            model,
            adapted_models: Vec::new(),
            mtp: None,
            compute: compute.into(),
            cache: CacheType::F32,
            device,
            schedule: RepackSchedule::default(),
        }
    }

    /// Adds an adapter that sequences may use. Returns its index for [`Self::start_with_adapter`]. The model's weights
    /// are shared, so the cost is the adapter's memory.
    ///
    /// # Errors
    /// If it cannot be attached.
    pub fn add_adapter<E>(
        &mut self,
        attach: impl FnOnce(&mut Model) -> std::result::Result<(), E>,
    ) -> std::result::Result<usize, E> {
        let mut model = self.model.clone();
        attach(&mut model)?;
        self.adapted_models.push(model);
        Ok(self.adapted_models.len() - 1)
    }

    /// Bytes of the weights that every token needs, including the drafting module.
    pub fn common_bytes(&self) -> usize {
        self.model.common_bytes() + self.mtp.as_ref().map_or(0, Mtp::size_bytes)
    }

    /// Bytes of routed experts, in memory or mapped.
    pub fn expert_bytes(&self) -> usize {
        self.model.expert_bytes()
    }

    /// Bytes of all weights, in memory or mapped.
    pub fn size_bytes(&self) -> usize {
        let of_mtp = self.mtp.as_ref().map_or(0, Mtp::size_bytes);
        self.model.size_bytes() + of_mtp
    }

    /// Continues a prompt. `on_token` gets each new token and may end the text.
    ///
    /// # Errors
    /// As [`Sequence::new`] and [`Self::step`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerateConfig,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut sequence = self.start(prompt, config)?;
        while sequence.finish_reason().is_none() {
            self.step([&mut sequence])?;
            if let Some(id) = sequence.new_token()
                && on_token(id).is_break()
            {
                sequence.stop();
            }
        }
        Ok(sequence.finish().0)
    }

    /// A sequence that begins with a prompt.
    ///
    /// # Errors
    /// As [`Sequence::new`].
    pub fn start(&self, prompt: &[u32], config: &GenerateConfig) -> Result<Sequence> {
        Sequence::new(&self.model, self.empty_prefix(), prompt, config)
    }

    /// A sequence that begins with a prompt and uses one of the added adapters. The result is the same as with that
    /// adapter alone; sequences of different adapters share no pass.
    ///
    /// # Errors
    /// As [`Sequence::new`].
    ///
    /// # Panics
    /// If no adapter has this index.
    pub fn start_with_adapter(
        &self,
        adapter_index: usize,
        prompt: &[u32],
        config: &GenerateConfig,
    ) -> Result<Sequence> {
        assert!(
            adapter_index < self.adapted_models.len(),
            "the index of an added adapter"
        );
        let prefix = self.empty_prefix().with_adapter(adapter_index);
        Sequence::new(&self.model, prefix, prompt, config)
    }

    /// The model of a sequence, with its adapter.
    pub(crate) fn model_of(&self, sequence: &Sequence) -> &Model {
        match sequence.adapter_index() {
            Some(index) => &self.adapted_models[index],
            None => &self.model,
        }
    }

    /// A prefix without tokens. Its sequences use speculative decoding if the engine has a module for it; those of
    /// [`KvPrefix::new`] do not.
    pub fn empty_prefix(&self) -> KvPrefix {
        match &self.mtp {
            Some(_) => KvPrefix::with_draft_state(&self.model, self.cache, &self.device),
            None => KvPrefix::new(&self.model, self.cache),
        }
    }

    /// Has weights repacked in memory between the next steps, where products read them fastest: the first ones that fit
    /// the budget, in bytes. Pages of their files are released. The budget should not exceed free memory: pages of a
    /// file can be dropped and read again, copies cannot.
    pub fn plan_repack(&mut self, budget: usize) {
        let (mut weights, schedule) = self.weights_and_schedule();
        schedule.plan(&mut weights, budget);
    }

    /// Keeps routed experts on disk, except the most recently used ones, which a cache of `budget` bytes holds; all
    /// other weights are repacked as by [`Self::plan_repack`]. For models that do not fit in memory. `n_prefetch`
    /// experts per layer are prefetched before the router chooses; none for half of top-k.
    pub fn cache_experts(&mut self, budget: usize, n_prefetch: Option<usize>) {
        let file = FileAccess {
            advise_willneed: checkpoint::advise_willneed,
            read: checkpoint::read,
        };
        let cache = Arc::new(ExpertCache::new(budget, self.compute, file));
        self.model.cache_experts(&cache, n_prefetch);
        self.plan_repack(usize::MAX);
    }

    /// Repacks now all that is planned. `on_bytes` gets the bytes done and their total.
    pub fn repack_all(&mut self, on_bytes: &mut dyn FnMut(usize, usize)) {
        let (mut weights, schedule) = self.weights_and_schedule();
        schedule.repack_all(&mut weights, on_bytes);
    }

    /// The weights that are repacked, and which of them are done.
    fn weights_and_schedule(&mut self) -> (EngineWeights<'_>, &mut RepackSchedule) {
        let weights = EngineWeights {
            compute: self.compute,
            model: &mut self.model,
            adapted_models: &mut self.adapted_models,
            mtp: self.mtp.as_mut(),
        };
        (weights, &mut self.schedule)
    }

    /// Advances sequences by one step. A sequence with an unread prompt reads a chunk of it. The others decode a token
    /// together; if some have logits from an accepted draft, only those do, without a pass. Ended sequences are left
    /// alone. Waits for the device. Planned repacking takes place before decoding, a part per step.
    ///
    /// # Errors
    /// If logits are not finite.
    pub fn step<'a>(
        &mut self,
        sequences: impl IntoIterator<Item = &'a mut Sequence>,
    ) -> Result<()> {
        let mut running: Vec<_> = sequences.into_iter().collect();
        running.retain_mut(|sequence| sequence.begin_step());
        let (mut decoding, prompts): (Vec<_>, Vec<_>) =
            running.into_iter().partition(|s| s.is_decoding());
        for sequence in prompts {
            let started = Instant::now();
            self.pass(&mut [sequence])?;
            self.catch_up(sequence, 1);
            self.schedule.last_pass = started.elapsed();
            sequence.generation().prefill_secs += self.schedule.last_pass.as_secs_f64();
        }
        if decoding.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let (mut weights, schedule) = self.weights_and_schedule();
        schedule.repack_for(&mut weights, schedule.last_pass);
        let repacked = Instant::now();
        self.decode(&mut decoding)?;
        self.schedule.last_pass = repacked.elapsed();
        let secs = started.elapsed().as_secs_f64();
        for sequence in decoding {
            sequence.generation().decode_secs += secs;
        }
        Ok(())
    }

    /// Chooses a token of each sequence, or only of those that need no pass for it.
    fn decode(&self, sequences: &mut [&mut Sequence]) -> Result<()> {
        if sequences
            .iter()
            .any(|sequence| sequence.has_verified_logits())
        {
            return sequences.iter_mut().try_for_each(|s| s.choose_verified());
        }
        self.draft(sequences);
        for batch in batch_by(sequences, |s| (s.adapter_index(), s.n_unread())) {
            self.pass(batch)?;
            for sequence in batch {
                self.catch_up(sequence, CHUNK);
            }
        }
        Ok(())
    }

    /// One pass over the next ids of sequences of one model, all with the same number of ids.
    fn pass(&self, sequences: &mut [&mut Sequence]) -> Result<()> {
        let next = sequences
            .iter()
            .flat_map(|sequence| sequence.next_ids(CHUNK));
        let ids: Vec<i32> = next.map(|id| id as i32).collect(); // Below the vocabulary's size, which is checked.
        let batch = sequences.len();
        let shape = [batch, ids.len() / batch];
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &self.device);

        let model = self.model_of(sequences[0]);
        let caches = sequences.iter_mut().map(|sequence| sequence.cache());
        let mut ctx = ForwardContext::cached(self.compute, caches);
        let hidden = model.hidden(ids, &mut ctx); // [batch, seq, hidden_size]
        drop(ctx);
        let n_choices = sequences[0].n_choices(shape[1]);
        let logits = self.last_logits(model, hidden.clone(), n_choices);

        let size = n_choices * self.model.config.vocab_size;
        for (row, sequence) in sequences.iter_mut().enumerate() {
            let logits = &logits[row * size..(row + 1) * size];
            let hidden = self
                .mtp
                .as_ref()
                .map(|_| hidden.clone().slice(row..row + 1));
            sequence.advance(shape[1], logits, hidden)?;
        }
        Ok(())
    }

    /// Logits `[batch, n, vocab]` after the last `n` of the hidden states `[batch, seq, hidden_size]`.
    fn last_logits(&self, model: &Model, hidden: Tensor<3>, n: usize) -> Vec<f32> {
        if n == 0 {
            return vec![];
        }
        let [batch, seq, hidden_size] = hidden.dims();
        let last = hidden.slice([0..batch, seq - n..seq]);
        let last = last.reshape([batch * n, hidden_size]);
        read_logits(model, last, &ForwardContext::new(self.compute))
    }
}
