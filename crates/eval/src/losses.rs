//! The loss of each sample, from which all scores are computed.
//!
//! Samples of similar length are batched and padded on the right. Attention is causal, so padding
//! is never seen by a token of the sample; it has no target, so it has no loss.

use burn::tensor::{Device, Int, Tensor, TensorData};
use data::{IGNORE, Sample, collate};
use model::device::read;
use model::{Compute, ForwardContext, Model};
use serde::Serialize;

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SampleLoss {
    /// Sum over its targets, in nats.
    pub loss_sum: f64,
    /// Number of targets.
    pub tokens: usize,
}

/// Padding needs an id that every model has.
pub(crate) const PAD_ID: u32 = 0;

/// The losses of samples, in their order. `progress` gets the number of samples done and their total.
///
/// # Errors
/// If a sample has an unknown id or is too long for the model, or a loss is not finite.
pub(crate) fn losses(
    model: &Model,
    samples: &[&Sample],
    config: &EvalConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<SampleLoss>> {
    check(model, samples)?;
    let mut losses = vec![SampleLoss::default(); samples.len()];
    // Samples without a target have a loss of 0 and need no pass. The sort is stable, so batches depend on the samples
    // only.
    let has_target = |index: &usize| samples[*index].trained_tokens() > 0;
    let mut order: Vec<usize> = (0..samples.len()).filter(has_target).collect();
    order.sort_by_key(|index| samples[*index].ids.len());

    let mut done = samples.len() - order.len();
    for indices in order.chunks(config.batch_size.max(1)) {
        let batch: Vec<&Sample> = indices.iter().map(|index| samples[*index]).collect();
        let found = batch_losses(model, &batch, config.compute);
        for (sample, loss) in indices.iter().copied().zip(found) {
            if !loss.loss_sum.is_finite() {
                let loss = loss.loss_sum;
                return Err(Error::NotFinite { sample, loss });
            }
            losses[sample] = loss;
        }
        done += indices.len();
        progress(done, samples.len());
    }
    Ok(losses)
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

/// One pass. Waits for the device.
fn batch_losses(model: &Model, samples: &[&Sample], compute: Compute) -> Vec<SampleLoss> {
    let batch = collate(samples, PAD_ID);
    let device: Device = model.model.norm.weight.val().device();
    let tensor = |ids: &[i32]| -> Tensor<2, Int> {
        let data = TensorData::new(ids.to_vec(), [batch.rows, batch.cols]);
        Tensor::from_data(data, &device)
    };
    let mut ctx = ForwardContext::new(compute);
    let hidden = model.hidden(tensor(&batch.input_ids), &mut ctx);
    let losses = model.loss(hidden, tensor(&batch.targets), &ctx); // [rows · cols]
    let losses = read(losses);

    let rows = losses
        .chunks(batch.cols)
        .zip(batch.targets.chunks(batch.cols));
    rows.map(|(losses, targets)| {
        let trained = losses.iter().zip(targets).filter(|(_, t)| **t != IGNORE);
        SampleLoss {
            loss_sum: trained.clone().map(|(loss, _)| f64::from(*loss)).sum(),
            tokens: trained.count(),
        }
    })
    .collect()
}
