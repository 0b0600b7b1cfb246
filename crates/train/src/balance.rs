//! Keeping the experts of a mixture evenly loaded, in DeepSeek's two ways.
//!
//! The *balance loss* is differentiable and added to the loss: per sequence, `Σ_e f_e · P_e` with `f_e` the share of
//! slots expert `e` got, scaled so that even load is 1, and `P_e` its mean normalized score. The *bias update* has no
//! gradient: after a step, the correction bias of every expert moves by a fixed amount towards even load.
//!
//! Padding counts in neither.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2, equations 17 to 20 (check the numbers); the update is that of
//! arXiv:2408.15664, algorithm 1.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};
use model::{Model, RoutingRecord};

use crate::routing::ExpertLoads;

/// The tokens of a batch that are not padding, and the sequence of each.
#[derive(Debug)]
pub(crate) struct RealTokens {
    /// 1 for a token, 0 for padding, `[tokens, 1]`.
    mask: Tensor<2>,
    /// `[sequences, tokens]`: one over the length of the sequence for each of its tokens.
    shares: Tensor<2>,
}

impl RealTokens {
    /// Of rows of these lengths padded to `cols`, in which sequences begin at `starts`.
    pub(crate) fn new(
        starts: &[Vec<usize>],
        lengths: &[usize],
        cols: usize,
        device: &Device,
    ) -> Self {
        let mask: Vec<f32> = lengths
            .iter()
            .flat_map(|len| (0..cols).map(move |col| f32::from(u8::from(col < *len))))
            .collect();
        let tokens = mask.len();
        let mut sequences = Vec::new();
        for (row, (starts, len)) in starts.iter().zip(lengths).enumerate() {
            let ends = starts.iter().skip(1).chain([len]);
            let ranges = starts.iter().zip(ends);
            sequences.extend(ranges.map(|(start, end)| row * cols + start..row * cols + end));
        }
        Self {
            mask: Tensor::from_data(TensorData::new(mask, [tokens, 1]), device),
            shares: shares(&sequences, tokens, device),
        }
    }

    /// How often each token's slots name each expert, `[tokens, experts]`; zero for padding.
    fn chosen(&self, ids: Tensor<2, Int>, experts: usize) -> Tensor<2> {
        let one_hot: Tensor<3> = ids.one_hot::<3>(experts).float();
        one_hot.sum_dim(1).squeeze_dim::<2>(1) * self.mask.clone()
    }

    /// Means over each sequence: `[tokens, experts]` → `[sequences, experts]`.
    fn mean(&self, x: Tensor<2>) -> Tensor<2> {
        self.shares.clone().matmul(x)
    }
}

/// One row for each sequence, given by its tokens.
fn shares(sequences: &[Range<usize>], tokens: usize, device: &Device) -> Tensor<2> {
    let mut shares = vec![0f32; sequences.len() * tokens];
    for (row, sequence) in shares.chunks_mut(tokens.max(1)).zip(sequences) {
        row[sequence.clone()].fill(1.0 / sequence.len().max(1) as f32);
    }
    Tensor::from_data(TensorData::new(shares, [sequences.len(), tokens]), device)
}

/// `Σ_e f_e · P_e` of one layer, averaged over the batch's sequences; 1 for even load.
pub(crate) fn balance_loss(record: &RoutingRecord, valid: &RealTokens) -> Tensor<1> {
    let routed = &record.routed;
    let ([_, experts], [_, top_k]) = (routed.scores.dims(), routed.ids.dims());
    let share =
        valid.mean(valid.chosen(routed.ids.clone(), experts)) * (experts as f32 / top_k as f32);
    let normalized = routed.scores.clone() / (routed.scores.clone().sum_dim(1) + 1e-20);
    let score = valid.mean(normalized * valid.mask.clone());
    let [sequences, _] = share.dims();
    (share.without_autodiff() * score).sum() / sequences as f32
}

/// Moves every correction bias by `speed` towards even load. `loads` are sums over the whole step.
pub(crate) fn update_biases(model: &mut Model, loads: &ExpertLoads, speed: f64) {
    for (layer_idx, bias) in model.correction_biases_mut() {
        let Some((_, load)) = loads.iter().find(|(layer, _)| *layer == layer_idx) else {
            continue;
        };
        let mean = load.iter().sum::<f64>() / load.len() as f64;
        let moves: Vec<f32> = load
            .iter()
            .map(|load| (speed * direction(mean - load)) as f32)
            .collect();
        *bias = bias.clone() + Tensor::from_floats(moves.as_slice(), &bias.device());
    }
}

/// The sign, 0 for 0.
fn direction(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::routing::BatchChoices;
    use model::{Compute, ForwardContext, Recorder, Training, load};

    #[test]
    #[expect(clippy::too_many_lines, reason = "one pass gives all three")]
    fn loss_load_and_update_are_the_goldens() {
        let device = Device::flex();
        for name in ["deepseek_v2_lite", "deepseek_v2_group", "deepseek_v3"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../../tests/goldens")
                .join(name);
            let golden: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap())
                    .unwrap();
            let ids = checkpoint::Safetensors::open(&folder.join("golden.safetensors"))
                .unwrap()
                .tensor("input_ids")
                .unwrap();
            let values: Vec<i32> = ids
                .bytes
                .chunks(8)
                .map(|id| i64::from_le_bytes(id.try_into().unwrap()) as i32)
                .collect();
            let ids = Tensor::<2, Int>::from_data(
                TensorData::new(values, [ids.shape[0], ids.shape[1]]),
                &device,
            );
            let mut model = load::load(
                &checkpoint::Folder::open(&folder).unwrap(),
                Training::Frozen,
                &device,
            )
            .unwrap();
            let mut recorder = Recorder::of_routing();
            let mut ctx = ForwardContext::recorded(Compute::F32, &mut recorder);
            let [rows, cols] = ids.dims();
            model.hidden(ids, &mut ctx);

            let valid = RealTokens::new(&vec![vec![0]; rows], &vec![cols; rows], cols, &device);
            let mut loads = Vec::new();
            for record in &recorder.routing {
                let expected = &golden["balance"][record.layer_idx.to_string()];
                let found = balance_loss(record, &valid).into_scalar::<f32>();
                let wanted = expected["seq_aux_sum_f_P"].as_f64().unwrap();
                assert!(
                    (f64::from(found) / wanted - 1.0).abs() < 1e-5,
                    "{name}: {found} {wanted}"
                );
                let wanted: Vec<f64> = expected["expert_load"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|n| n.as_f64().unwrap())
                    .collect();
                let lengths = vec![cols; rows];
                let (ids, [_, top_k]) = (&record.routed.ids, record.routed.ids.dims());
                let ids = ids.clone().into_data();
                let ids = ids.iter::<i64>().map(|id| id as u16);
                let choices = BatchChoices::new(record.layer_idx, top_k, ids, &lengths, cols);
                let load = choices.load(wanted.len());
                assert_eq!(load, wanted, "{name}");
                loads.push((record.layer_idx, load));
            }
            update_biases(&mut model, &loads, 0.001);
            for (layer_idx, bias) in model.correction_biases() {
                let wanted =
                    golden["balance"][layer_idx.to_string()]["bias_after_one_update_gamma_0.001"]
                        .as_array()
                        .unwrap();
                let found: Vec<f32> = bias.clone().into_data().try_to_vec().unwrap();
                for (found, wanted) in found.iter().zip(wanted) {
                    assert!(
                        (f64::from(*found) - wanted.as_f64().unwrap()).abs() < 1e-7,
                        "{name} layer {layer_idx}"
                    );
                }
            }
        }
    }

    #[test]
    fn means_are_over_sequences_without_padding() {
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[1.], [3.], [9.], [4.], [6.], [9.]], &device);
        let means = |valid: &RealTokens| -> Vec<f32> {
            valid.mean(x.clone()).into_data().try_to_vec().unwrap()
        };
        let valid = RealTokens::new(&[vec![0], vec![0]], &[2, 3], 3, &device);
        let close = |found: Vec<f32>, expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            let near = |(f, e): (&f32, &f32)| (f - e).abs() < 1e-6 * e;
            assert!(found.iter().zip(expected).all(near), "{found:?}");
        };
        close(means(&valid), &[2.0, 19.0 / 3.0]);
        let packed = RealTokens::new(&[vec![0], vec![0, 2]], &[2, 3], 3, &device);
        close(means(&packed), &[2.0, 5.0, 9.0]);
    }

    #[test]
    fn padding_has_no_load() {
        let device = Device::flex();
        let valid = RealTokens::new(&[vec![0], vec![0]], &[3, 1], 3, &device);
        let ids = Tensor::<2, Int>::from_ints([[0], [1], [1], [2], [0], [0]], &device);
        let chosen: Vec<f32> = valid
            .chosen(ids, 3)
            .sum_dim(0)
            .into_data()
            .try_to_vec()
            .unwrap();
        assert_eq!(chosen, [1.0, 2.0, 1.0]);
    }
}
