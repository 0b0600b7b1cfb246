//! What a model has answered, kept as it comes and taken from there when the same is asked again.
//!
//! A piece of work has one key for all that its answers depend on but the model itself. Texts are scored a pass at a time, so the
//! key is that of the pass: with other texts next to it, a text's score may differ in its last bits.

use infer::{GenerateConfig, SampleConfig, ScoreConfig, ScorePlan, ScoreRequest, TokenScore};
use model::Model;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Answers of one model by the keys of the work that they took.
pub trait AnswerStore {
    /// The answers of a piece of work that is done, and none of another.
    fn known(&mut self, key: &str) -> Option<Value>;

    /// Keeps the answers of a piece of work.
    ///
    /// # Errors
    /// If they cannot be written.
    fn keep(&mut self, key: &str, answers: &Value) -> std::io::Result<()>;
}

/// Keeps nothing.
impl AnswerStore for () {
    fn known(&mut self, _key: &str) -> Option<Value> {
        None
    }

    fn keep(&mut self, _key: &str, _answers: &Value) -> std::io::Result<()> {
        Ok(())
    }
}

/// How a model finds the scored tokens of a request, together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SpanScore {
    /// The logarithm of their probability.
    pub(crate) logprob: f64,
    /// Whether each is the most likely one.
    pub(crate) is_greedy: bool,
    /// Scored tokens.
    pub(crate) tokens: usize,
}

/// The scores of requests, and the work that they take.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SpanScores {
    pub(crate) scores: Vec<SpanScore>,
    /// Tokens that are read, now or before.
    pub(crate) read: usize,
    /// Tokens that would be read without sharing.
    pub(crate) asked: usize,
}

/// Scores requests, except in passes that the store knows. `progress` gets the number of requests done and their total.
///
/// # Errors
/// If a request does not fit the model, a score is not finite, or the store fails.
pub(crate) fn score_spans(
    model: &Model,
    requests: &[ScoreRequest],
    config: ScoreConfig,
    store: &mut dyn AnswerStore,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<SpanScores> {
    let plan = ScorePlan::new(model, requests, config)?;
    let nothing = SpanScore::of(&[]);
    let mut all = SpanScores {
        scores: vec![nothing; requests.len()],
        read: 0,
        asked: plan.asked(),
    };
    let is_done = |request: &&ScoreRequest| request.scored.is_empty();
    let mut done = requests.iter().filter(is_done).count();
    for pass in 0..plan.len() {
        let numbers = plan.requests_of(pass);
        let key = key_of_pass(numbers.iter().map(|number| &requests[*number]));
        let found = match store.known(&key) {
            Some(known) => read_spans(&known, numbers.len()).ok_or_else(|| unreadable(&key))?,
            None => {
                let scores = plan.run(model, pass)?;
                let spans: Vec<_> = scores.iter().map(|of| SpanScore::of(of)).collect();
                let kept = spans.iter().map(|span| span.to_json()).collect();
                store.keep(&key, &kept).map_err(Error::Keep)?;
                spans
            }
        };
        all.read += plan.read_by(pass);
        done += numbers.len();
        for (number, score) in numbers.iter().zip(found) {
            all.scores[*number] = score;
        }
        progress(done, requests.len());
    }
    Ok(all)
}

/// An entry of a store that is not what is kept under its key.
pub(crate) fn unreadable(key: &str) -> Error {
    Error::Kept {
        key: key.to_owned(),
    }
}

impl SpanScore {
    fn of(tokens: &[TokenScore]) -> Self {
        Self {
            logprob: tokens.iter().fold(0.0, |sum, token| sum + token.logprob),
            is_greedy: tokens.iter().all(|token| token.is_greedy),
            tokens: tokens.len(),
        }
    }

    /// The number as a text, which is read to the same bits again.
    fn to_json(self) -> Value {
        json!([self.logprob.to_string(), self.is_greedy, self.tokens])
    }

    fn read(value: &Value) -> Option<Self> {
        let [logprob, is_greedy, tokens] = value.as_array()?.as_slice() else {
            return None;
        };
        let logprob: f64 = logprob.as_str()?.parse().ok()?;
        Some(Self {
            logprob: Some(logprob).filter(|logprob| logprob.is_finite())?,
            is_greedy: is_greedy.as_bool()?,
            tokens: tokens.as_u64()?.try_into().ok()?,
        })
    }
}

fn read_spans(kept: &Value, n: usize) -> Option<Vec<SpanScore>> {
    let kept = kept.as_array().filter(|kept| kept.len() == n)?;
    kept.iter().map(SpanScore::read).collect()
}

fn key_of_pass<'a>(requests: impl Iterator<Item = &'a ScoreRequest>) -> String {
    let requests = requests.map(|request| json!([request.ids, request.scored]));
    key(&json!(["scored", requests.collect::<Vec<_>>()]))
}

/// The key of a text that a model writes after a prompt, of which the first `common` tokens are read apart.
pub(crate) fn key_of_text(
    (prompt, common): (&[u32], usize),
    config: &GenerateConfig,
    stops: &[String],
) -> String {
    let GenerateConfig {
        max_tokens,
        sample,
        stop_ids,
        logprobs: _, // They change no text.
    } = config;
    let SampleConfig {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        repetition_window,
        seed,
    } = sample;
    let seed = (*temperature > 0.0).then_some(seed);
    key(&json!([
        "written",
        prompt,
        common,
        max_tokens,
        [temperature, top_p, min_p, repetition_penalty],
        [top_k, repetition_window],
        seed,
        stop_ids,
        stops
    ]))
}

fn key(content: &Value) -> String {
    data::sha256(&content.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_to_the_same_bits() {
        for logprob in [-0.1 - 0.2, -1.0 / 3.0, -f64::from(1.1_f32), -1e-300, 0.0] {
            let span = SpanScore {
                logprob,
                is_greedy: true,
                tokens: 3,
            };
            let text = span.to_json().to_string();
            let read = SpanScore::read(&serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(read.logprob.to_bits(), logprob.to_bits());
            assert_eq!(read, span);
        }
        for wrong in [
            json!([]),
            json!(["x", true, 1]),
            json!(["inf", true, 1]),
            json!(["-1", true, -1]),
            json!(null),
        ] {
            assert_eq!(SpanScore::read(&wrong), None, "{wrong}");
        }
        assert_eq!(read_spans(&json!([["-1", true, 1]]), 2), None);
    }

    #[test]
    fn all_that_an_answer_depends_on_is_in_its_key() {
        let of = |ids: &[u32], n| key_of_pass([ScoreRequest::of_last(ids.to_vec(), n)].iter());
        assert_eq!(of(&[1, 2, 3], 1), of(&[1, 2, 3], 1));
        assert_ne!(of(&[1, 2, 3], 1), of(&[1, 2, 3], 2));
        assert_ne!(of(&[1, 2, 3], 1), of(&[1, 2, 4], 1));
        let config = GenerateConfig {
            max_tokens: 4,
            sample: SampleConfig::greedy(),
            stop_ids: vec![0],
            logprobs: None,
        };
        let plain = key_of_text((&[1], 0), &config, &[]);
        let with = |change: &dyn Fn(&mut GenerateConfig)| {
            let mut config = config.clone();
            change(&mut config);
            key_of_text((&[1], 0), &config, &[])
        };
        assert_eq!(plain, with(&|config| config.sample.seed = 7)); // It draws nothing.
        let mut keys = vec![
            plain,
            key_of_text((&[2], 0), &config, &[]),
            key_of_text((&[1], 1), &config, &[]),
            key_of_text((&[1], 0), &config, &["\n".into()]),
            with(&|config| config.max_tokens = 5),
            with(&|config| config.stop_ids = vec![]),
            with(&|config| config.sample.top_k = 5),
            with(&|config| config.sample.temperature = 0.5),
        ];
        keys.push(with(&|config| {
            config.sample.temperature = 0.5;
            config.sample.seed = 7;
        }));
        let n = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), n);
    }
}
