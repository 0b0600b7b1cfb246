//! Which experts a task uses, and which of them are worth training: expert-specialized fine-tuning.
//!
//! Of every layer, an expert's load is the share of the task's tokens it gets, or the share of their gate weights, as a mean
//! over the samples. Those to train are the fewest whose loads add up to a threshold.
//!
//! Source: ESFT, arXiv:2407.01906, section 3.2.

use burn::tensor::{Int, Tensor, TensorData};
use data::{Batch, Sample, collate};
use model::{ForwardContext, Model, Observe, RoutingRecord};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::losses::{EvalConfig, PAD_ID, check};

/// The load of one layer's experts; each list adds up to 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertLoad {
    /// Which layer.
    pub layer: usize,
    /// The share of the slots of every expert.
    pub tokens: Vec<f64>,
    /// The share of the gate weight of every expert.
    pub gates: Vec<f64>,
}

/// Experts to train, largest load first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChosenExperts {
    /// Their numbers.
    pub experts: Vec<usize>,
    /// What their loads add up to.
    pub share: f64,
}

/// Measures the load of every mixture layer on samples; padding does not count. `progress` is told how many are done and
/// how many there are.
///
/// # Errors
/// If there is no sample, the model has no experts, or a sample does not fit the model.
pub fn expert_loads(
    model: &Model,
    samples: &[Sample],
    config: &EvalConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<ExpertLoad>> {
    if samples.is_empty() {
        return Err(Error::Nothing { expected: "sample" });
    }
    check(model, &samples.iter().collect::<Vec<_>>())?;
    let mut loads: Vec<ExpertLoad> = Vec::new();
    let mut done = 0;
    for chunk in samples.chunks(config.batch_size.max(1)) {
        let batch = collate(&chunk.iter().collect::<Vec<_>>(), PAD_ID);
        for record in routing(model, &batch, config) {
            add(&mut loads, &record, &batch);
        }
        done += chunk.len();
        progress(done, samples.len());
    }
    if loads.is_empty() {
        return Err(Error::Nothing {
            expected: "layer with routed experts",
        });
    }
    for load in &mut loads {
        for shares in [&mut load.tokens, &mut load.gates] {
            shares.iter_mut().for_each(|share| *share /= done as f64);
        }
    }
    Ok(loads)
}

/// The fewest experts whose shares add up to `threshold`; of equal shares, the lower number first.
pub fn choose(shares: &[f64], threshold: f64) -> ChosenExperts {
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]).then(a.cmp(b)));
    let (mut experts, mut share) = (Vec::new(), 0.0);
    for expert in order {
        // Shares are means in f64: a sum may miss a threshold that it is by the last bits.
        if share >= threshold - 1e-9 {
            break;
        }
        share += shares[expert];
        experts.push(expert);
    }
    ChosenExperts { experts, share }
}

fn routing(model: &Model, batch: &Batch, config: &EvalConfig) -> Vec<RoutingRecord> {
    let device = model.model.norm.weight.val().device();
    let ids = TensorData::new(batch.input_ids.clone(), [batch.rows, batch.cols]);
    let mut ctx = ForwardContext {
        observe: Observe::Routing,
        ..ForwardContext::new(config.compute)
    };
    model.hidden(Tensor::<2, Int>::from_data(ids, &device), &mut ctx);
    ctx.routing
}

/// Adds the shares of a batch's samples, each of which counts the same. Waits for the device.
fn add(loads: &mut Vec<ExpertLoad>, record: &RoutingRecord, batch: &Batch) {
    let routed = &record.routed;
    let ([_, n_experts], [_, top_k]) = (routed.scores.dims(), routed.ids.dims());
    let ids: Vec<usize> = routed
        .ids
        .clone()
        .into_data()
        .iter::<i64>()
        .map(|id| id as usize)
        .collect();
    let weights: Vec<f64> = routed
        .weights
        .clone()
        .into_data()
        .iter::<f32>()
        .map(f64::from)
        .collect();
    if loads.iter().all(|load| load.layer != record.layer_idx) {
        loads.push(ExpertLoad {
            layer: record.layer_idx,
            tokens: vec![0.0; n_experts],
            gates: vec![0.0; n_experts],
        });
    }
    let Some(load) = loads.iter_mut().find(|load| load.layer == record.layer_idx) else {
        return;
    };
    for (row, length) in batch.lengths.iter().enumerate() {
        let slots = row * batch.cols * top_k..(row * batch.cols + length) * top_k;
        let (ids, weights) = (&ids[slots.clone()], &weights[slots]);
        let whole = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        for (id, weight) in ids.iter().zip(weights) {
            load.tokens[*id] += 1.0 / ids.len() as f64;
            load.gates[*id] += weight / whole;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_experts_reach_the_threshold() {
        let check = |threshold, experts: &[usize], share: f64| {
            let found = choose(&[0.1, 0.3, 0.2, 0.3, 0.1], threshold);
            assert_eq!(found.experts, experts, "{threshold}");
            assert!(
                (found.share - share).abs() < 1e-12,
                "{threshold}: {}",
                found.share
            );
        };
        check(0.2, &[1], 0.3);
        check(0.3, &[1], 0.3);
        check(0.31, &[1, 3], 0.6);
        check(0.8, &[1, 3, 2], 0.8);
        check(1.0, &[1, 3, 2, 0, 4], 1.0);
        check(0.0, &[], 0.0);
    }
}
