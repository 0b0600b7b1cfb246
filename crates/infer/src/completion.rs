//! Prompts to text: several sequences at a time, decoded, and ended at stop strings.
//!
//! A [`Completion`] owns all it needs, so that a caller can keep it for as long as a request lasts. [`CompletionQueue`]
//! decides which completions take part in the next step: as soon as one ends, the next one in the queue joins the
//! others.

use std::collections::VecDeque;
use std::sync::Arc;

use data::Tokenizer;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::sequence::{FinishReason, GenerateConfig, Generation, KvPrefix, Sequence};
use crate::text_stream::TextStream;

/// A sequence and its text so far.
#[derive(Debug)]
pub struct Completion {
    sequence: Sequence,
    /// None without a tokenizer.
    stream: Option<TextStream>,
    text: String,
    /// Why the tokens cannot be decoded.
    problem: Option<Error>,
}

/// A completion that has ended.
#[derive(Clone, Debug)]
pub struct Completed {
    /// The new tokens, why they ended, and their statistics.
    pub generation: Generation,
    /// The whole text. Without a tokenizer: the ids, each followed by a space.
    pub text: String,
    /// The end of the text that no earlier step returned.
    pub rest: String,
    /// The stop string that ended the text, if one did.
    pub stop_string: Option<String>,
    /// The tokens that the model has read, for a prompt that begins with them.
    pub prefix: KvPrefix,
}

impl Completion {
    /// A completion of a sequence that ends before the first stop string. Without a tokenizer, its text is made of ids.
    ///
    /// # Errors
    /// If a stop string is empty, or there are stop strings and no tokenizer.
    pub fn new(
        sequence: Sequence,
        tokenizer: Option<Arc<Tokenizer>>,
        stops: &[String],
    ) -> Result<Self> {
        if tokenizer.is_none() && !stops.is_empty() {
            return Err(Error::StopWithoutTokenizer);
        }
        let stream = tokenizer.map(|tokenizer| TextStream::new(tokenizer, stops));
        Ok(Self {
            sequence,
            stream: stream.transpose()?,
            text: String::new(),
            problem: None,
        })
    }

    /// Its tokens.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Why it has ended, if it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.sequence.finish_reason()
    }

    /// Ends it.
    pub fn cancel(&mut self) {
        self.sequence.stop();
    }

    /// Advances this completion alone by one step. Returns the new text that is certain.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step(&mut self, engine: &mut Engine) -> Result<String> {
        engine.step([&mut self.sequence])?;
        Ok(self.new_text())
    }

    /// The new text after a step. A stop string ends the sequence, and so does a problem, which [`Self::finish`]
    /// returns.
    fn new_text(&mut self) -> String {
        let Some(id) = self.sequence.new_token() else {
            return String::new();
        };
        let piece = match &mut self.stream {
            None => format!("{id} "),
            Some(stream) => match stream.step(id) {
                Ok(piece) => {
                    if stream.stop_string().is_some() {
                        self.sequence.end_at_stop_string();
                    }
                    piece
                }
                Err(problem) => {
                    self.problem.get_or_insert(problem);
                    self.sequence.stop();
                    String::new()
                }
            },
        };
        self.text += &piece;
        piece
    }

    /// The result.
    ///
    /// # Errors
    /// If the tokens could not be decoded.
    pub fn finish(self) -> Result<Completed> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        let stop_string = self.stream.as_ref().and_then(TextStream::stop_string);
        let stop_string = stop_string.map(str::to_owned);
        let rest = self.stream.map(TextStream::finish).transpose()?;
        let rest = rest.unwrap_or_default();
        let (generation, prefix) = self.sequence.finish();
        Ok(Completed {
            generation,
            text: self.text + &rest,
            rest,
            stop_string,
            prefix,
        })
    }
}

/// Completions in progress and those that wait.
#[derive(Debug)]
pub struct CompletionQueue {
    /// Completions that share a step, at most.
    batch: usize,
    n_added: usize,
    waiting: VecDeque<(usize, Completion)>,
    running: Vec<(usize, Completion)>,
}

/// What a step did to one completion.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// The number of the completion in the queue, from [`CompletionQueue::push`].
    pub number: usize,
    /// The completion after the step.
    pub completion: &'a mut Completion,
    /// Its new text that is certain.
    pub new_text: &'a str,
}

impl CompletionQueue {
    /// An empty queue. At most `batch` completions share a step, and at least 1.
    pub fn new(batch: usize) -> Self {
        Self {
            batch: batch.max(1),
            n_added: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
        }
    }

    /// Adds a completion. Returns its number, counted from 0.
    pub fn push(&mut self, completion: Completion) -> usize {
        self.waiting.push_back((self.n_added, completion));
        self.n_added += 1;
        self.n_added - 1
    }

    /// Whether no completion waits or is in progress.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Advances the completions in progress by one step, calls `on_step` for each, and returns those that have ended
    /// with their numbers.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step(
        &mut self,
        engine: &mut Engine,
        on_step: &mut dyn FnMut(StepOutput<'_>),
    ) -> Result<Vec<(usize, Completion)>> {
        let n_free = self.batch - self.running.len();
        let joining = n_free.min(self.waiting.len());
        self.running.extend(self.waiting.drain(..joining));
        engine.step(self.running.iter_mut().map(|(_, c)| &mut c.sequence))?;
        for (number, completion) in &mut self.running {
            let new_text = completion.new_text();
            on_step(StepOutput {
                number: *number,
                completion,
                new_text: &new_text,
            });
        }
        let ended =
            |(_, completion): &mut (usize, Completion)| completion.finish_reason().is_some();
        Ok(self.running.extract_if(.., ended).collect())
    }
}

impl Engine {
    /// Continues several prompts, up to `batch` at a time. After each step, `on_step` gets every sequence that took
    /// part, with the number of its prompt. Returns the continuations in the order of the prompts.
    ///
    /// # Errors
    /// As [`Sequence::new`] and [`Self::step`].
    pub fn generate_all(
        &mut self,
        prompts: &[Vec<u32>],
        config: &GenerateConfig,
        batch: usize,
        on_step: &mut dyn FnMut(usize, &Sequence),
    ) -> Result<Vec<Generation>> {
        let sequences = prompts.iter().map(|prompt| self.start(prompt, config));
        self.finish_all(sequences.collect::<Result<_>>()?, batch, on_step)
    }

    /// [`Self::generate_all`] for sequences that have started.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn finish_all(
        &mut self,
        sequences: Vec<Sequence>,
        batch: usize,
        on_step: &mut dyn FnMut(usize, &Sequence),
    ) -> Result<Vec<Generation>> {
        let completions = sequences
            .into_iter()
            .map(|sequence| Completion::new(sequence, None, &[]));
        let completions = completions.collect::<Result<_>>()?;
        let completed = self.complete_all(completions, batch, &mut |output| {
            on_step(output.number, output.completion.sequence());
        })?;
        Ok(completed.into_iter().map(|done| done.generation).collect())
    }

    /// Continues several completions to their ends, up to `batch` at a time, and calls `on_step` for each after every
    /// step. Returns the results in their order.
    ///
    /// # Errors
    /// As [`Self::step`], and if tokens could not be decoded.
    pub fn complete_all(
        &mut self,
        completions: Vec<Completion>,
        batch: usize,
        on_step: &mut dyn FnMut(StepOutput<'_>),
    ) -> Result<Vec<Completed>> {
        let mut queue = CompletionQueue::new(batch);
        for completion in completions {
            queue.push(completion);
        }
        let mut done = Vec::new();
        while !queue.is_empty() {
            done.extend(queue.step(self, on_step)?);
        }
        done.sort_unstable_by_key(|(number, _)| *number);
        done.into_iter().map(|(_, done)| done.finish()).collect()
    }
}
