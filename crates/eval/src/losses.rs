//! The loss of each sample, from which all scores are computed.

use data::Sample;
use infer::{ScoreConfig, ScoreRequest};
use model::{Compute, Model};
use serde::{Deserialize, Serialize};

use crate::answer_store::{AnswerStore, SpanScore, score_spans};
use crate::error::{Error, Result};

/// How models are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalConfig {
    /// Samples per batch; 0 counts as 1.
    pub batch_size: usize,
    /// What products round their operands to.
    pub compute: Compute,
}

/// The loss of one sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleLoss {
    /// Sum over its targets, in nats.
    pub loss_sum: f64,
    /// Number of targets.
    pub tokens: usize,
}

/// The losses of samples, in their order. `progress` gets the number of samples done and their total.
///
/// # Errors
/// If a sample has an unknown id or is too long for the model, a loss is not finite, or the store fails.
pub(crate) fn losses(
    model: &Model,
    samples: &[&Sample],
    config: &EvalConfig,
    store: &mut dyn AnswerStore,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<SampleLoss>> {
    check(model, samples)?;
    let longest = samples.iter().map(|sample| sample.ids.len()).max();
    let config = ScoreConfig {
        compute: config.compute,
        pass_tokens: config.batch_size.max(1) * longest.unwrap_or(0),
        top: 0,
    };
    let requests: Vec<ScoreRequest> = samples.iter().map(|sample| request(sample)).collect();
    let found = score_spans(model, &requests, config, store, progress);
    let found = found.map_err(|problem| match problem {
        Error::Infer(infer::Error::ScoreNotFinite { request, found }) => Error::NotFinite {
            sample: request,
            loss: -found,
        },
        other => other,
    })?;
    let loss = |span: SpanScore| SampleLoss {
        loss_sum: 0.0 - span.logprob,
        tokens: span.tokens,
    };
    Ok(found.scores.into_iter().map(loss).collect())
}

/// The targets of a sample. Its first token is none: there is nothing before it.
fn request(sample: &Sample) -> ScoreRequest {
    let trained = sample.trained.iter().enumerate().skip(1);
    ScoreRequest {
        ids: sample.ids.clone(),
        scored: trained
            .filter(|(_, trained)| **trained)
            .map(|(at, _)| at)
            .collect(),
    }
}

pub(crate) fn check(model: &Model, samples: &[&Sample]) -> Result<()> {
    let (vocab_size, limit) = (
        model.config.vocab_size,
        model.config.max_position_embeddings,
    );
    for (sample, content) in samples.iter().enumerate() {
        let found = content.ids.len();
        if found > limit {
            return Err(Error::ContextLength {
                sample,
                limit,
                found,
            });
        }
        let unknown = |id: &&u32| **id as usize >= vocab_size;
        if let Some(&id) = content.ids.iter().find(unknown) {
            return Err(Error::Vocabulary {
                sample,
                id,
                vocab_size,
            });
        }
    }
    Ok(())
}
