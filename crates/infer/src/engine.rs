//! Generation: prompts in pieces through their caches, then one token of every sequence at a time.
//!
//! Sequences join a step when they are given to it and leave it when they have ended: nothing is padded, and none waits
//! for another's end. What a sequence gives is what it gives alone. Prompts are read one by one for that, and in the
//! products of a step every sequence has a row of its own; with more than 8 rows the sums of a product run in another
//! order, so that logits differ by roundings from those of fewer.
//!
//! With a module that guesses ([`crate::speculation`]) a pass may choose two tokens of a sequence. The second is then chosen
//! in a step of its own, which costs no pass and for which other sequences wait, so that they share the next one.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use model::{CacheType, Compute, ForwardContext, Model, Mtp, Training, weights};

use crate::error::Result;
use crate::layout::Layout;
use crate::sequence::{Context, GenerateConfig, Generation, Sequence};
use crate::speculation::groups;

/// Tokens of a prompt in one pass. Attention scores of a piece are `[heads, CHUNK, kv_seq]`, so that a long prompt
/// costs memory in proportion to its length and not to its square; products of so many rows run at full speed.
pub const CHUNK: usize = 512;

/// A model that continues prompts.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The model; an adapter, if any, is attached.
    pub model: Model,
    /// The model with other adapters, among which sequences may choose.
    pub(crate) adapted: Vec<Model>,
    /// What guesses tokens ahead, for the same text in fewer passes; none for a pass per token.
    pub mtp: Option<Mtp>,
    /// What products round their operands to.
    pub compute: Compute,
    /// In what form it holds what attention reads of earlier tokens.
    pub cache: CacheType,
    /// Where it computes.
    pub device: Device,
    pub(crate) layout: Layout,
}

impl Engine {
    /// A frozen model from its folder, without an adapter, with a cache in f32.
    ///
    /// # Errors
    /// If the folder cannot be read or holds no model we compute.
    pub fn open(folder: &Path, compute: Compute, device: Device) -> Result<Self> {
        let model = weights::load(&Folder::open(folder)?, Training::Frozen, &device)?;
        Ok(Self::new(model, compute, device))
    }

    /// An engine without adapters to choose among, and without guesses, whose weights stay where they are.
    pub fn new(model: Model, compute: Compute, device: Device) -> Self {
        Self {
            model,
            adapted: Vec::new(),
            mtp: None,
            compute,
            cache: CacheType::F32,
            device,
            layout: Layout::default(),
        }
    }

    /// Holds the model with another adapter, among which sequences may choose: returns its number for
    /// [`Self::begin_adapted`]. It shares the model's weights, so it costs the memory of the adapter.
    ///
    /// # Errors
    /// If it cannot be attached.
    pub fn adapt<E>(
        &mut self,
        attach: impl FnOnce(&mut Model) -> std::result::Result<(), E>,
    ) -> std::result::Result<usize, E> {
        let mut model = self.model.clone();
        attach(&mut model)?;
        self.adapted.push(model);
        Ok(self.adapted.len() - 1)
    }

    /// Bytes of the weights that every token needs, and of what guesses tokens.
    pub fn common_bytes(&mut self) -> usize {
        self.model.common_bytes() + self.mtp.as_mut().map_or(0, Mtp::size_bytes)
    }

    /// Bytes that weights hold in memory or map.
    pub fn size_bytes(&mut self) -> usize {
        let of_mtp = self.mtp.as_mut().map_or(0, Mtp::size_bytes);
        self.model.size_bytes() + of_mtp
    }

    /// Continues a prompt, and tells each new token as it comes.
    ///
    /// # Errors
    /// As [`Sequence::new`] and [`Self::step`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerateConfig,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut sequence = self.begin(prompt, config)?;
        while sequence.stopped().is_none() {
            self.step([&mut sequence])?;
            if let Some(id) = sequence.new_token()
                && on_token(id).is_break()
            {
                sequence.stop();
            }
        }
        Ok(sequence.finish().0)
    }

    /// Continues several prompts, up to `batch` at a time: where one ends, the next begins. After every step it shows those
    /// that took part, each with the number of its prompt. Returns what came after each prompt, in their order.
    ///
    /// # Errors
    /// As [`Sequence::new`] and [`Self::step`].
    pub fn generate_all(
        &mut self,
        prompts: &[Vec<u32>],
        config: &GenerateConfig,
        batch: usize,
        on_step: &mut dyn FnMut(usize, &mut Sequence),
    ) -> Result<Vec<Generation>> {
        let begun = prompts.iter().map(|prompt| self.begin(prompt, config));
        self.finish_all(begun.collect::<Result<_>>()?, batch, on_step)
    }

    /// [`Self::generate_all`] of sequences that have begun.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn finish_all(
        &mut self,
        sequences: Vec<Sequence>,
        batch: usize,
        on_step: &mut dyn FnMut(usize, &mut Sequence),
    ) -> Result<Vec<Generation>> {
        let mut done: Vec<Option<Generation>> = vec![None; sequences.len()];
        let mut waiting = sequences.into_iter().enumerate();
        let mut running: Vec<(usize, Sequence)> = Vec::new();
        loop {
            let n_free = batch.max(1) - running.len();
            running.extend(waiting.by_ref().take(n_free));
            if running.is_empty() {
                return Ok(done.into_iter().flatten().collect());
            }
            self.step(running.iter_mut().map(|(_, sequence)| sequence))?;
            for (number, sequence) in &mut running {
                on_step(*number, sequence);
            }
            for (number, ended) in running.extract_if(.., |(_, s)| s.stopped().is_some()) {
                done[number] = Some(ended.finish().0);
            }
        }
    }

    /// A text that begins with a prompt.
    ///
    /// # Errors
    /// As [`Sequence::new`].
    pub fn begin(&self, prompt: &[u32], config: &GenerateConfig) -> Result<Sequence> {
        Sequence::new(&self.model, self.context(), prompt, config)
    }

    /// A text that begins with a prompt, of one of the adapted models. What it gives is what it gives with that model alone;
    /// sequences of different models share no pass.
    ///
    /// # Errors
    /// As [`Sequence::new`].
    ///
    /// # Panics
    /// If there is no such model.
    pub fn begin_adapted(
        &self,
        number: usize,
        prompt: &[u32],
        config: &GenerateConfig,
    ) -> Result<Sequence> {
        assert!(number < self.adapted.len(), "an adapted model");
        let context = self.context().of_adapted(number);
        Sequence::new(&self.model, context, prompt, config)
    }

    /// The model that a sequence is of.
    pub(crate) fn model_of(&self, sequence: &Sequence) -> &Model {
        match sequence.adapted() {
            Some(number) => &self.adapted[number],
            None => &self.model,
        }
    }

    /// What has read nothing yet. A sequence over it is guessed ahead if there is a module for it; one over
    /// [`Context::new`] is not.
    pub fn context(&self) -> Context {
        match &self.mtp {
            Some(_) => Context::guessed_ahead(&self.model, self.cache, &self.device),
            None => Context::new(&self.model, self.cache),
        }
    }

    /// Takes sequences one step further: each whose prompt is not read by a piece of it, and the others, together, by a
    /// token; if an earlier pass has said of some of these what comes next, only those, without a pass. Sequences that have
    /// ended stay as they are. Waits for the device. Weights that are to be kept in memory are copied before a token, some at
    /// a time.
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
            self.layout.last_pass = started.elapsed();
            sequence.generation().prefill_secs += self.layout.last_pass.as_secs_f64();
        }
        if decoding.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        self.repack_for(self.layout.last_pass);
        let laid_out = Instant::now();
        self.decode(&mut decoding)?;
        self.layout.last_pass = laid_out.elapsed();
        let secs = started.elapsed().as_secs_f64();
        for sequence in decoding {
            sequence.generation().decode_secs += secs;
        }
        Ok(())
    }

    /// Chooses a token of each sequence, or of those that need no pass for it.
    fn decode(&self, sequences: &mut [&mut Sequence]) -> Result<()> {
        if sequences.iter().any(|sequence| sequence.is_ahead()) {
            return sequences.iter_mut().try_for_each(|s| s.choose_ahead());
        }
        self.guess(sequences);
        for group in groups(sequences, |s| (s.adapted(), s.n_unread())) {
            self.pass(group)?;
            for sequence in group {
                self.catch_up(sequence, CHUNK);
            }
        }
        Ok(())
    }

    /// One pass over the next ids of sequences, of all the same number, and all of one model.
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

    /// Logits after the last `n` of some hidden states `[batch, seq, hidden_size]`, `[batch, n, vocab]`.
    fn last_logits(&self, model: &Model, hidden: Tensor<3>, n: usize) -> Vec<f32> {
        if n == 0 {
            return vec![];
        }
        let [batch, seq, hidden_size] = hidden.dims();
        let last = hidden.slice([0..batch, seq - n..seq]);
        let last = last.reshape([batch * n, hidden_size]);
        let logits = model.logits(last, &ForwardContext::new(self.compute));
        logits.into_data().try_to_vec().expect("logits are f32")
    }
}
