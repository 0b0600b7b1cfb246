//! What a model answers to the items of a task.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use data::{
    OutputType, ScoredTokens, TaskDefinition, TaskEncoder, TaskItem, TaskRequest, Tokenizer,
};
use infer::{
    Completion, CompletionQueue, Engine, GenerateConfig, KvPrefix, SampleConfig, ScoreConfig,
    ScoreRequest, Sequence,
};
use model::Model;
use serde::Serialize;

use crate::answer_store::{AnswerStore, SpanScore, key_of_text, score_spans, unreadable};
use crate::error::{Error, Result};

/// The tokens of an answer, unless a task says otherwise.
const ANSWER_TOKENS: usize = 256;

/// What a model answers to one request.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// How it finds a text.
    Likelihood {
        /// The logarithm of the text's probability.
        logprob: f64,
        /// Whether it would have written the text itself.
        is_greedy: bool,
    },
    /// A text that it writes.
    Text(String),
}

/// How a model is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerConfig {
    /// Tokens that the model reads, at most.
    pub max_length: usize,
    /// Tokens of a pass over texts to be scored.
    pub pass_tokens: usize,
    /// Answers that are written at a time.
    pub batch: usize,
    /// Tokens that end a text.
    pub end_ids: Vec<u32>,
    /// The first seed of answers that are drawn.
    pub seed: u64,
    /// What ends a thought, which is no part of an answer. None if answers have no thoughts.
    pub thought_end: Option<String>,
}

/// The answers to all items of a task, and the work that they took.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Answers {
    /// The answers to each item, one for each request, or for each repetition of one.
    #[serde(skip)]
    pub of_items: Vec<Vec<Answer>>,
    /// Requests of which a beginning was left out.
    pub n_cut: usize,
    /// Tokens that the model has read.
    pub read: usize,
    /// Tokens that it would have read without sharing.
    pub asked: usize,
}

/// The requests of a task's items, in the tokens of a model.
#[derive(Debug)]
pub struct TaskRequests {
    /// The requests of each item.
    per_item: Vec<usize>,
    tokens: RequestTokens,
    n_cut: usize,
    config: AnswerConfig,
}

#[derive(Debug)]
enum RequestTokens {
    /// Texts that are scored, in one window or several.
    Scored(Vec<Vec<ScoredTokens>>),
    /// Prompts that are continued.
    Written(Prompts),
}

/// Prompts, and how a model continues them.
#[derive(Debug)]
struct Prompts {
    ids: Vec<Vec<u32>>,
    /// Answers to each.
    repeats: usize,
    generate: GenerateConfig,
    stops: Vec<String>,
}

impl TaskRequests {
    /// Encodes the requests of all items.
    ///
    /// # Errors
    /// If a request has no token to score, or leaves no room for an answer: with the number of the item.
    pub fn new(
        tokenizer: &Tokenizer,
        task: &TaskDefinition,
        items: &[TaskItem],
        config: AnswerConfig,
    ) -> Result<Self> {
        let encoder = TaskEncoder::new(tokenizer, config.max_length)?;
        let of_items = |encode: &dyn Fn(&TaskRequest) -> data::Result<Vec<ScoredTokens>>| {
            let of_item = |(number, item): (usize, &TaskItem)| {
                let requests = item.question.requests.iter().map(encode);
                let requests: data::Result<Vec<_>> = requests.collect();
                requests.map_err(|problem| Error::from(problem).of_item(number))
            };
            let all = items.iter().enumerate().map(of_item);
            all.collect::<Result<Vec<_>>>().map(|all| all.concat())
        };
        let tokens = of_items(&|request| match (&request.continuation, task.output) {
            (Some(text), OutputType::LoglikelihoodRolling) => encoder.windows(text),
            (Some(text), _) => Ok(vec![encoder.pair(&request.context, text)?]),
            (None, _) => {
                let (ids, n_cut) = encoder.prompt(&request.context, max_tokens(task))?;
                let n_scored = 0;
                Ok(vec![ScoredTokens {
                    ids,
                    n_scored,
                    n_cut,
                }])
            }
        })?;
        Ok(Self {
            per_item: items
                .iter()
                .map(|item| item.question.requests.len())
                .collect(),
            n_cut: tokens.iter().flatten().filter(|of| of.n_cut > 0).count(),
            tokens: match task.output {
                OutputType::GenerateUntil => {
                    let ids = tokens.into_iter().flatten().map(|of| of.ids).collect();
                    RequestTokens::Written(Prompts::new(task, ids, &config))
                }
                _ => RequestTokens::Scored(tokens),
            },
            config,
        })
    }

    /// The tokens of the longest request.
    pub fn longest(&self) -> usize {
        let longest = match &self.tokens {
            RequestTokens::Scored(tokens) => tokens.iter().flatten().map(|of| of.ids.len()).max(),
            RequestTokens::Written(prompts) => prompts.ids.iter().map(Vec::len).max(),
        };
        longest.unwrap_or(0)
    }

    /// Sets the tokens of a pass over texts to be scored.
    pub fn set_pass_tokens(&mut self, pass_tokens: usize) {
        self.config.pass_tokens = pass_tokens;
    }

    /// Requests to a model.
    pub fn count(&self) -> usize {
        match &self.tokens {
            RequestTokens::Scored(tokens) => tokens.iter().map(Vec::len).sum(),
            RequestTokens::Written(prompts) => prompts.count(),
        }
    }

    /// Asks a model. `progress` gets the number of requests done and their total.
    ///
    /// # Errors
    /// If a request does not fit the model, a score is not finite, or the store fails.
    pub fn answer(
        self,
        engine: &mut Engine,
        tokenizer: &Arc<Tokenizer>,
        store: &mut dyn AnswerStore,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Answers> {
        let answers = match self.tokens {
            RequestTokens::Scored(tokens) => {
                let config = ScoreConfig {
                    compute: engine.compute,
                    pass_tokens: self.config.pass_tokens,
                    top: 0,
                };
                score(&engine.model, tokens, config, store, progress)?
            }
            RequestTokens::Written(prompts) => {
                let batch = self.config.batch;
                let mut writer = Writer {
                    engine,
                    tokenizer,
                    store,
                    progress,
                };
                let thought_end = self.config.thought_end.as_deref();
                let texts = writer.texts(&prompts, batch, self.config.seed)?;
                prompts.answers(texts, thought_end)
            }
        };
        let (answers, read, asked) = answers;
        let mut answers = answers.into_iter();
        let of_item = |n: &usize| answers.by_ref().take(*n).flatten().collect();
        Ok(Answers {
            of_items: self.per_item.iter().map(of_item).collect(),
            n_cut: self.n_cut,
            read,
            asked,
        })
    }
}

/// The answers to each request, the tokens read, and those read without sharing.
type Answered = (Vec<Vec<Answer>>, usize, usize);

fn score(
    model: &Model,
    tokens: Vec<Vec<ScoredTokens>>,
    config: ScoreConfig,
    store: &mut dyn AnswerStore,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Answered> {
    let windows: Vec<usize> = tokens.iter().map(Vec::len).collect();
    let requests: Vec<ScoreRequest> = tokens
        .into_iter()
        .flatten()
        .map(|of| ScoreRequest::of_last(of.ids, of.n_scored))
        .collect();
    let found = score_spans(model, &requests, config, store, progress)?;
    let mut scores = found.scores.into_iter();
    let of_request = |n: usize| {
        let windows: Vec<SpanScore> = scores.by_ref().take(n).collect();
        vec![Answer::Likelihood {
            logprob: windows.iter().fold(0.0, |sum, window| sum + window.logprob),
            is_greedy: windows.iter().all(|window| window.is_greedy),
        }]
    };
    let answers = windows.into_iter().map(of_request).collect();
    Ok((answers, found.read, found.asked))
}

fn max_tokens(task: &TaskDefinition) -> usize {
    task.generation.max_tokens.unwrap_or(ANSWER_TOKENS)
}

impl Prompts {
    fn new(task: &TaskDefinition, ids: Vec<Vec<u32>>, config: &AnswerConfig) -> Self {
        let settings = &task.generation;
        let sample = SampleConfig {
            temperature: settings.temperature as f32,
            top_p: settings.top_p.unwrap_or(1.0) as f32,
            top_k: settings.top_k.unwrap_or(0),
            ..SampleConfig::greedy()
        };
        let stops = settings.until.iter().filter(|stop| !stop.is_empty());
        Self {
            ids,
            repeats: task.repeats,
            generate: GenerateConfig {
                max_tokens: max_tokens(task),
                sample,
                stop_ids: config.end_ids.clone(),
                logprobs: None,
            },
            stops: stops.cloned().collect(),
        }
    }

    /// Texts that are written.
    fn count(&self) -> usize {
        self.ids.len() * self.repeats
    }

    /// The prompt of a text, and how it is continued.
    fn request(&self, number: usize, seed: u64) -> (&[u32], GenerateConfig) {
        let mut generate = self.generate.clone();
        generate.sample.seed = seed + number as u64;
        (&self.ids[number / self.repeats], generate)
    }

    /// Tokens that all texts' prompts begin with, and that are read once; none if that is not worth it. Each prompt has one more.
    fn common(&self) -> usize {
        let same = |first: &[u32], other: &[u32]| {
            let pairs = first.iter().zip(other);
            pairs.take_while(|(a, b)| a == b).count()
        };
        let Some((first, others)) = self.ids.split_first().filter(|_| self.count() > 1) else {
            return 0;
        };
        let common = others.iter().map(|other| same(first, other));
        let common = common.min().unwrap_or(first.len());
        let shortest = self.ids.iter().map(Vec::len).min().unwrap_or(0);
        let common = common.min(shortest.saturating_sub(1));
        if common < FEWEST_COMMON { 0 } else { common }
    }

    /// The answers in texts.
    fn answers(&self, texts: Vec<String>, thought_end: Option<&str>) -> Answered {
        let asked: usize = self.ids.iter().map(|ids| ids.len() * self.repeats).sum();
        let read = asked - self.common() * self.count().saturating_sub(1);
        let answer = |text: String| match thought_end {
            Some(end) => Answer::Text(data::without_thought(&text, end).to_owned()),
            None => Answer::Text(text),
        };
        let answers: Vec<Answer> = texts.into_iter().map(answer).collect();
        let answers = answers
            .chunks(self.repeats)
            .map(<[Answer]>::to_vec)
            .collect();
        (answers, read, asked)
    }
}

/// Tokens that prompts begin with, at least, for reading them apart to be worth it.
const FEWEST_COMMON: usize = 16;

/// A model that writes answers.
struct Writer<'a> {
    engine: &'a mut Engine,
    tokenizer: &'a Arc<Tokenizer>,
    store: &'a mut dyn AnswerStore,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl Writer<'_> {
    /// The texts after prompts, up to `batch` at a time, except those that the store knows.
    fn texts(&mut self, prompts: &Prompts, batch: usize, seed: u64) -> Result<Vec<String>> {
        let common = prompts.common();
        let mut texts: Vec<Option<String>> = vec![None; prompts.count()];
        let mut waiting = VecDeque::new();
        for (number, text) in texts.iter_mut().enumerate() {
            let (ids, generate) = prompts.request(number, seed);
            let key = key_of_text((ids, common), &generate, &prompts.stops);
            match self.store.known(&key) {
                None => waiting.push_back((number, key)),
                Some(known) => {
                    let known = known.as_str().ok_or_else(|| unreadable(&key))?;
                    *text = Some(known.to_owned());
                }
            }
        }
        if !waiting.is_empty() {
            let prefix = self.read(&prompts.ids[0][..common])?;
            let mut queue = CompletionQueue::new(batch);
            let mut running = BTreeMap::new();
            while !waiting.is_empty() || !running.is_empty() {
                // No more than take part: each has a KV cache of its own.
                let free = batch.max(1) - running.len();
                for (number, key) in waiting.drain(..free.min(waiting.len())) {
                    let (ids, generate) = prompts.request(number, seed);
                    let model = &self.engine.model;
                    let sequence = Sequence::new(model, prefix.clone(), ids, &generate)?;
                    let tokenizer = Some(Arc::clone(self.tokenizer));
                    let completion = Completion::new(sequence, tokenizer, &prompts.stops)?;
                    running.insert(queue.push(completion), (number, key));
                }
                self.step(&mut queue, &mut running, &mut texts)?;
            }
        }
        Ok(texts.into_iter().flatten().collect())
    }

    /// Reads what all prompts begin with.
    fn read(&mut self, common: &[u32]) -> Result<KvPrefix> {
        if common.is_empty() {
            return Ok(self.engine.empty_prefix());
        }
        // The last token of a sequence is not read, and this one is not wanted.
        let config = GenerateConfig {
            max_tokens: 1,
            sample: SampleConfig::greedy(),
            stop_ids: Vec::new(),
            logprobs: None,
        };
        let mut sequence = self.engine.start(common, &config)?;
        while sequence.finish_reason().is_none() {
            self.engine.step([&mut sequence])?;
        }
        Ok(sequence.finish().1)
    }

    /// Advances all that is running, and keeps what has ended, by the numbers in the queue.
    fn step(
        &mut self,
        queue: &mut CompletionQueue,
        running: &mut BTreeMap<usize, (usize, String)>,
        texts: &mut [Option<String>],
    ) -> Result<()> {
        let ended = queue.step(self.engine, &mut |_| {})?;
        if ended.is_empty() {
            return Ok(());
        }
        for (number, completion) in ended {
            let text = completion.finish()?.text;
            if let Some((place, key)) = running.remove(&number) {
                let kept = self.store.keep(&key, &text.as_str().into());
                kept.map_err(Error::Keep)?;
                texts[place] = Some(text);
            }
        }
        let done = texts.iter().flatten().count();
        (self.progress)(done, texts.len());
        Ok(())
    }
}
