//! Generation: prompts in pieces through their caches, then one token of every sequence at a time.
//!
//! Sequences join a step when they are given to it and leave it when they have ended: nothing is padded, and none waits
//! for another's end. What a sequence gives is what it gives alone. Prompts are read one by one for that, and in the
//! products of a step every sequence has a row of its own; with more than 8 rows the sums of a product run in another
//! order, so that logits differ by roundings from those of fewer.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, Int, Tensor, TensorData};
use checkpoint::Folder;
use model::{Compute, Model, Pass, Training, weights};

use crate::error::Result;
use crate::sequence::{Context, GenerateConfig, Generation, Sequence};

/// Tokens of a prompt in one pass. Attention scores of a piece are `[heads, CHUNK, kv_seq]`, so that a long prompt
/// costs memory in proportion to its length and not to its square; products of so many rows run at full speed.
const CHUNK: usize = 512;

/// Bytes of a file that are held at most after they were copied.
const MOST_HELD: usize = 8 << 20;

/// A model that continues prompts.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The model; an adapter, if any, is attached.
    pub model: Model,
    /// What products round their operands to.
    pub compute: Compute,
    /// Where it computes.
    pub device: Device,
}

impl Engine {
    /// A frozen model from its folder, without an adapter.
    ///
    /// # Errors
    /// If the folder cannot be read or holds no model we compute.
    pub fn open(folder: &Path, compute: Compute, device: Device) -> Result<Self> {
        let model = weights::load(&Folder::open(folder)?, Training::Frozen, &device)?;
        Ok(Self {
            model,
            compute,
            device,
        })
    }

    /// Copies the weights into memory as products read them fastest, and gives back what is held of their files. Says how
    /// many bytes were copied, of how many that there are. Not for a model that memory has no room for: a file's bytes can be
    /// dropped and read again, copies cannot.
    pub fn lay_out(&mut self, on_bytes: &mut dyn FnMut(usize, usize)) {
        let (mut done, total) = (0, self.model.size_bytes());
        let (mut copied, mut held) = (vec![], 0);
        self.model.lay_out(&mut |matrix| {
            done += matrix.size_bytes();
            on_bytes(done, total);
            copied.push(matrix.bytes().clone());
            held += matrix.bytes().len();
            // Several together: reading a part brings some of what lies beside it back.
            if held >= MOST_HELD {
                copied
                    .drain(..)
                    .for_each(|bytes| checkpoint::forget(&bytes));
                held = 0;
            }
        });
        copied.iter().for_each(|bytes| checkpoint::forget(bytes));
    }

    /// Continues a prompt, and tells each new token as it comes.
    ///
    /// # Errors
    /// As [`Sequence::new`] and [`Self::step`].
    pub fn generate(
        &self,
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
        &self,
        prompts: &[Vec<u32>],
        config: &GenerateConfig,
        batch: usize,
        on_step: &mut dyn FnMut(usize, &mut Sequence),
    ) -> Result<Vec<Generation>> {
        let begun = prompts.iter().map(|prompt| self.begin(prompt, config));
        let mut waiting = begun.collect::<Result<Vec<_>>>()?.into_iter().enumerate();
        let mut running: Vec<(usize, Sequence)> = Vec::new();
        let mut done: Vec<Option<Generation>> = vec![None; prompts.len()];
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
        Sequence::new(&self.model, Context::new(&self.model), prompt, config)
    }

    /// Takes sequences one step further: each whose prompt is not read by a piece of it, and the others, together, by a
    /// token. Those that have ended stay as they are. Waits for the device.
    ///
    /// # Errors
    /// If logits are not finite.
    pub fn step<'a>(&self, sequences: impl IntoIterator<Item = &'a mut Sequence>) -> Result<()> {
        let running = sequences.into_iter().filter(|s| s.stopped().is_none());
        let (mut decoding, prompts): (Vec<_>, Vec<_>) = running.partition(|s| s.is_decoding());
        for sequence in prompts {
            self.pass(&mut [sequence])?;
        }
        if decoding.is_empty() {
            return Ok(());
        }
        self.pass(&mut decoding)
    }

    /// One pass over the next ids of sequences, of all the same number.
    fn pass(&self, sequences: &mut [&mut Sequence]) -> Result<()> {
        let started = Instant::now();
        let next = sequences.iter().map(|sequence| sequence.next_ids(CHUNK));
        let ids: Vec<i32> = next.flatten().map(|id| *id as i32).collect(); // Below the vocabulary's size, which is checked.
        let batch = sequences.len();
        let shape = [batch, ids.len() / batch];
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &self.device);

        let caches = sequences.iter_mut().map(|sequence| sequence.cache());
        let mut pass = Pass::cached(self.compute, caches);
        let hidden = self.model.hidden(ids, &mut pass); // [batch, seq, hidden_size]
        drop(pass);
        // A piece of a prompt that is not its last chooses nothing.
        let last = sequences
            .iter()
            .all(|sequence| sequence.ends_with(shape[1]));
        let logits = if last {
            self.last_logits(hidden)
        } else {
            vec![]
        };

        let vocab_size = self.model.config.vocab_size;
        for (row, sequence) in sequences.iter_mut().enumerate() {
            let logits = logits.get(row * vocab_size..(row + 1) * vocab_size);
            sequence.advance(shape[1], logits, started)?;
        }
        Ok(())
    }

    /// Logits after the last of some hidden states `[batch, seq, hidden_size]`, `[batch, vocab]`.
    fn last_logits(&self, hidden: Tensor<3>) -> Vec<f32> {
        let [batch, seq, hidden_size] = hidden.dims();
        let last = hidden.slice([0..batch, seq - 1..seq]);
        let last = last.reshape([batch, hidden_size]);
        let logits = self.model.logits(last, &Pass::new(self.compute));
        logits.into_data().try_to_vec().expect("logits are f32")
    }
}
