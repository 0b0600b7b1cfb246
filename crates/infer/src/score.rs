//! The probabilities of given tokens, each after all before it.
//!
//! Requests are read in the order of their ids, many in a pass, and what several begin with is read once; see `prefix_tree.rs`.

use burn::tensor::{Int, Tensor, TensorData};
use kernels::device::{read, read_ints};
use model::{Compute, ForwardContext, Model};

use crate::error::{Error, Result};
use crate::logits::read_logits;
use crate::prefix_tree::PrefixTree;
use crate::sequence::Logprobs;

/// Token ids, and those of them that are scored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScoreRequest {
    /// The whole sequence.
    pub ids: Vec<u32>,
    /// The places of the scored ones, in order. The first token has nothing before it, so it is none of them.
    pub scored: Vec<usize>,
}

/// How a model finds a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The logarithm of its probability.
    pub logprob: f64,
    /// Whether no token is more likely.
    pub is_greedy: bool,
    /// The most likely tokens, as many as were wanted.
    pub top: Vec<(u32, f64)>,
}

/// How requests are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreConfig {
    /// What products round their operands to.
    pub compute: Compute,
    /// Tokens of a pass. A longer request has a pass of its own.
    pub pass_tokens: usize,
    /// The most likely tokens that are wanted in the place of each scored one.
    pub top: usize,
}

/// The scores of requests, and the work that they took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// One for each scored token of each request.
    pub scores: Vec<Vec<TokenScore>>,
    /// Tokens that the model has read.
    pub read: usize,
    /// Tokens that it would have read without sharing.
    pub asked: usize,
}

impl ScoreRequest {
    /// A request of which the last `n` tokens are scored.
    pub fn of_last(ids: Vec<u32>, n: usize) -> Self {
        let scored = ids.len() - n..ids.len();
        Self {
            scored: scored.collect(),
            ids,
        }
    }

    /// What the model reads.
    fn input(&self) -> &[u32] {
        let end = self.scored.last().copied().unwrap_or(0);
        &self.ids[..end]
    }
}

/// Scores tokens. `progress` gets the number of requests done and their total.
///
/// # Errors
/// As [`ScorePlan::new`] and [`ScorePlan::run`].
pub fn score(
    model: &Model,
    requests: &[ScoreRequest],
    config: ScoreConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Scores> {
    let plan = ScorePlan::new(model, requests, config)?;
    let mut all = Scores {
        scores: vec![Vec::new(); requests.len()],
        read: 0,
        asked: plan.asked(),
    };
    let is_done = |request: &&ScoreRequest| request.scored.is_empty();
    let mut done = requests.iter().filter(is_done).count();
    for pass in 0..plan.len() {
        let found = plan.run(model, pass)?;
        all.read += plan.read_by(pass);
        done += found.len();
        for (number, scores) in plan.requests_of(pass).iter().zip(found) {
            all.scores[*number] = scores;
        }
        progress(done, requests.len());
    }
    Ok(all)
}

/// Requests in passes: in the order of their ids, as many as fit.
///
/// A request has the score that it has alone, to the rounding of products with other numbers of rows; in the same pass it has
/// the same score, bit for bit.
#[derive(Debug)]
pub struct ScorePlan<'a> {
    requests: &'a [ScoreRequest],
    config: ScoreConfig,
    passes: Vec<ScorePass>,
}

impl<'a> ScorePlan<'a> {
    /// # Errors
    /// If a request has an unknown id or is too long for the model.
    pub fn new(model: &Model, requests: &'a [ScoreRequest], config: ScoreConfig) -> Result<Self> {
        for (number, request) in requests.iter().enumerate() {
            check(model, number, request)?;
        }
        // A request without a scored token needs no pass.
        let mut order: Vec<usize> = (0..requests.len())
            .filter(|number| !requests[*number].scored.is_empty())
            .collect();
        order.sort_by(|a, b| requests[*a].input().cmp(requests[*b].input()));
        let (mut passes, mut pass) = (Vec::new(), ScorePass::default());
        for number in order {
            let request = &requests[number];
            let tokens = pass.tree.ids().len() + pass.tree.added_by(request.input());
            if tokens > config.pass_tokens && !pass.requests.is_empty() {
                passes.push(std::mem::take(&mut pass));
            }
            pass.add(number, request);
        }
        if !pass.requests.is_empty() {
            passes.push(pass);
        }
        Ok(Self {
            requests,
            config,
            passes,
        })
    }

    /// Passes.
    pub fn len(&self) -> usize {
        self.passes.len()
    }

    /// Whether nothing is to be scored.
    pub fn is_empty(&self) -> bool {
        self.passes.is_empty()
    }

    /// The numbers of a pass's requests.
    ///
    /// # Panics
    /// If there is no such pass.
    pub fn requests_of(&self, pass: usize) -> &[usize] {
        &self.passes[pass].requests
    }

    /// Tokens that all passes would read if each request were read alone.
    pub fn asked(&self) -> usize {
        let numbers = self.passes.iter().flat_map(|pass| &pass.requests);
        numbers
            .map(|number| self.requests[*number].input().len())
            .sum()
    }

    /// Tokens that a pass reads.
    ///
    /// # Panics
    /// If there is no such pass.
    pub fn read_by(&self, pass: usize) -> usize {
        self.passes[pass].tree.ids().len()
    }

    /// The scores of a pass's requests, one for each scored token. Waits for the device.
    ///
    /// # Errors
    /// If a score is not finite.
    ///
    /// # Panics
    /// If there is no such pass.
    pub fn run(&self, model: &Model, pass: usize) -> Result<Vec<Vec<TokenScore>>> {
        self.passes[pass].run(model, self.requests, self.config)
    }
}

fn check(model: &Model, number: usize, request: &ScoreRequest) -> Result<()> {
    let config = &model.config;
    let (vocab_size, limit) = (config.vocab_size, config.max_position_embeddings);
    assert!(
        request.scored.is_sorted_by(|a, b| a < b)
            && request.scored.first() != Some(&0)
            && request
                .scored
                .last()
                .is_none_or(|last| *last < request.ids.len()),
        "places of tokens with others before them, in order"
    );
    if request.input().len() > limit {
        return Err(Error::ScoreLength {
            request: number,
            limit,
            found: request.input().len(),
        });
    }
    let unknown = |id: &&u32| **id as usize >= vocab_size;
    match request.ids.iter().find(unknown) {
        None => Ok(()),
        Some(&id) => Err(Error::ScoreVocabulary {
            request: number,
            id,
            vocab_size,
        }),
    }
}

/// Requests that are read together.
#[derive(Debug, Default)]
struct ScorePass {
    tree: PrefixTree,
    requests: Vec<usize>,
    /// The places of the tokens before the scored ones, request by request.
    rows: Vec<usize>,
}

impl ScorePass {
    fn add(&mut self, number: usize, request: &ScoreRequest) {
        let places = self.tree.add(request.input());
        self.rows
            .extend(request.scored.iter().map(|at| places[at - 1]));
        self.requests.push(number);
    }

    /// One pass. Waits for the device.
    fn run(
        &self,
        model: &Model,
        requests: &[ScoreRequest],
        config: ScoreConfig,
    ) -> Result<Vec<Vec<TokenScore>>> {
        let device = model.model.norm.weight.val().device();
        let ids: Vec<i32> = self.tree.ids().iter().map(|id| *id as i32).collect(); // They are checked.
        let seq = ids.len();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, seq]), &device);
        let mut ctx = ForwardContext::new(config.compute);
        ctx.segments = self.tree.segments();
        let hidden = model.hidden(ids, &mut ctx);
        let [_, _, width] = hidden.dims();
        let rows: Vec<i32> = self.rows.iter().map(|row| *row as i32).collect(); // Below the length of a pass.
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &device);
        let hidden = hidden.reshape([seq, width]).select(0, rows);

        let scored = self.requests.iter().map(|number| &requests[*number]);
        let targets = scored.flat_map(|request| request.scored.iter().map(|at| request.ids[*at]));
        let targets: Vec<u32> = targets.collect();
        let mut scores = match config.top {
            0 => greedy_scores(model, hidden, &targets, &ctx),
            top => top_scores(model, hidden, &targets, top, &ctx),
        }
        .into_iter();
        let of_request = |number: &usize| {
            let n = requests[*number].scored.len();
            let scores: Vec<TokenScore> = scores.by_ref().take(n).collect();
            match scores.iter().find(|score| !score.logprob.is_finite()) {
                None => Ok(scores),
                Some(score) => Err(Error::ScoreNotFinite {
                    request: *number,
                    found: score.logprob,
                }),
            }
        };
        self.requests.iter().map(of_request).collect()
    }
}

fn greedy_scores(
    model: &Model,
    hidden: Tensor<2>,
    targets: &[u32],
    ctx: &ForwardContext<'_>,
) -> Vec<TokenScore> {
    let ids: Vec<i32> = targets.iter().map(|id| *id as i32).collect();
    let ids = Tensor::<1, Int>::from_data(ids.as_slice(), &hidden.device());
    let found = model.token_scores(hidden, ids, ctx);
    let (losses, greedy) = (read(found.losses), read_ints(found.greedy));
    let tokens = losses.into_iter().zip(greedy).zip(targets);
    let score = |((loss, greedy), target): ((f32, i64), &u32)| TokenScore {
        logprob: -f64::from(loss),
        is_greedy: greedy == i64::from(*target),
        top: Vec::new(),
    };
    tokens.map(score).collect()
}

/// Rows whose logits are in memory at a time.
const LOGIT_ROWS: usize = 64;

fn top_scores(
    model: &Model,
    hidden: Tensor<2>,
    targets: &[u32],
    top: usize,
    ctx: &ForwardContext<'_>,
) -> Vec<TokenScore> {
    let vocab_size = model.config.vocab_size;
    let mut scores = Vec::with_capacity(targets.len());
    for (part, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
        let start = part * LOGIT_ROWS;
        let rows = hidden.clone().slice(start..start + targets.len());
        let logits = read_logits(model, rows, ctx);
        for (logits, target) in logits.chunks(vocab_size).zip(targets) {
            let found = Logprobs::new(logits, *target, top);
            scores.push(TokenScore {
                logprob: found.chosen,
                is_greedy: found.top.first().is_some_and(|(id, _)| id == target),
                top: found.top,
            });
        }
    }
    scores
}
