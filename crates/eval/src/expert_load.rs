//! The experts that a task uses, and the choice of those to train: expert-specialized fine-tuning.
//!
//! An expert's load is its share of a layer's tokens, or of their gate weights, as a mean over the task's samples. The
//! experts to train are the fewest with a total load of at least a threshold.
//!
//! Source: ESFT, arXiv:2407.01906, section 3.2.

use burn::tensor::{Int, Tensor, TensorData};
use data::{Batch, Sample, collate};
use model::device::{read, read_ints};
use model::{ForwardContext, Model, Recorder, RoutingRecord};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::losses::{EvalConfig, check};

/// Padding needs an id that every model has.
const PAD_ID: u32 = 0;

/// The load of one layer's experts; each list adds up to 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertLoad {
    /// The layer.
    pub layer: usize,
    /// Share of the layer's token-to-expert assignments, by expert.
    pub tokens: Vec<f64>,
    /// Share of the layer's gate weights, by expert.
    pub gates: Vec<f64>,
}

/// Experts to train, largest load first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChosenExperts {
    /// Their ids.
    pub experts: Vec<usize>,
    /// Their total load.
    pub share: f64,
}

/// Measures the load of every mixture layer on samples; padding does not count. `progress` gets the number of samples
/// done and their total.
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

/// The fewest experts with a total share of at least `threshold`; ties go to the lower id.
pub fn choose(shares: &[f64], threshold: f64) -> ChosenExperts {
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]).then(a.cmp(b)));
    let (mut experts, mut share) = (Vec::new(), 0.0);
    for expert in order {
        // Shares are means in f64: a sum that equals the threshold may differ from it in the last bits.
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
    let mut recorder = Recorder::of_routing();
    let mut ctx = ForwardContext::recorded(config.compute, &mut recorder);
    model.hidden(Tensor::<2, Int>::from_data(ids, &device), &mut ctx);
    recorder.routing
}

/// Adds the shares of a batch's samples; each sample counts the same. Waits for the device.
fn add(loads: &mut Vec<ExpertLoad>, record: &RoutingRecord, batch: &Batch) {
    let routed = &record.routed;
    let ([_, n_experts], [_, top_k]) = (routed.scores.dims(), routed.ids.dims());
    let ids = read_ints(routed.ids.clone()).into_iter();
    let ids: Vec<usize> = ids.map(|id| id as usize).collect();
    let weights = read(routed.weights.clone()).into_iter();
    let weights: Vec<f64> = weights.map(f64::from).collect();
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
