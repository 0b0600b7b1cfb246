//! Fake-quantized weights with updates, against the sum computed and rounded whole, with rounding as the identity in
//! the gradient.

use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ8_0, GgmlType};
use moeforge_kernels::fp8::{Scales, encode_tiles, f32_to_e4m3};
use moeforge_kernels::{FakeQuantize, Format, Ggml, Matrix, Quantizer, linear_fake_quantized};

use super::*;

/// Multiples of 1/64 between −1 and 1: sums of a few products of them are exact, so that no order of adding can push a
/// sum over the edge between two rounded values.
fn coarse<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    (random(shape) * 64.0).round() / 64.0
}

fn through<B: GgmlType>(values: &[f32]) -> Vec<f32> {
    let mut blocks = vec![B::zeros(); values.len() / B::BLCK_SIZE];
    let mut rounded = vec![0.0; values.len()];
    B::from_float(values, &mut blocks);
    B::to_float(&blocks, &mut rounded);
    rounded
}

fn through_fp8(values: &[f32], shape: [usize; 2]) -> Vec<f32> {
    let mut rounded = vec![0.0; values.len()];
    encode_tiles(values, shape, [128, 128], Scales::F32).decode(0..shape[0], &mut rounded);
    rounded
}

/// A matrix in a format, decoded by independent code where there is some.
fn rounded(w: &Tensor<2>, format: &str) -> Tensor<2> {
    let (shape, w) = (w.dims(), values(w));
    let w = match format {
        "fp8" => through_fp8(&w, shape),
        "gguf:q4_0" => through::<BlockQ4_0>(&w),
        "gguf:q8_0" => through::<BlockQ8_0>(&w),
        "gguf:q4_k" => through_q4_k(&w),
        other => panic!("{other}"),
    };
    Tensor::from_data(TensorData::new(w, shape), &device())
}

/// The search for scales has goldens of its own.
fn through_q4_k(values: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0; values.len() / 256 * 144];
    Ggml::Q4K.encode(values, &mut bytes);
    let matrix = Matrix::dense(1, values.len(), Format::Ggml(Ggml::Q4K), bytes.into());
    matrix.unwrap().to_f32()
}

/// The rounded sum, with the gradient of the sum.
fn straight_through(w: &Tensor<2>, update: Tensor<2>, format: &str) -> Tensor<2> {
    let constant = rounded(&(w.clone() + update.clone().detach()), format);
    constant + (update.clone() - update.detach())
}

#[test]
fn a_merged_product_is_that_of_the_rounded_sum() {
    for ([tokens, out, inner], format) in [
        ([1, 5, 64], "gguf:q4_0"),
        ([9, 300, 96], "gguf:q4_0"),
        ([530, 700, 288], "gguf:q8_0"),
        ([40, 33, 512], "gguf:q4_k"),
        ([3, 130, 70], "fp8"),
        ([600, 197, 330], "fp8"),
        ([40, 513, 260], "fp8"),
    ] {
        let (x, w) = (random([tokens, inner]), coarse([out, inner]));
        let (a, b) = (coarse([3, inner]), coarse([out, 3]));
        let quantizer: Quantizer = format.parse().unwrap();
        for matrix in stored(&w).into_iter().filter(|m| {
            let kept = dense(m);
            values(&kept) == values(&w)
        }) {
            let matrix = Arc::new(matrix);
            let scale = 0.5;
            agree!(
                format!("{format} of {out} × {inner}"),
                [x, a, b],
                linear_fake_quantized(
                    x.clone(),
                    &matrix,
                    Some([a.clone(), b.clone()]),
                    FakeQuantize { scale, quantizer },
                    Compute::F32
                ),
                x.clone().matmul(
                    straight_through(&w, b.clone().matmul(a.clone()) * scale, format).transpose()
                )
            );
        }
        let matrix = Arc::new(Matrix::from_f32(out, inner, &values(&w)));
        let merge = FakeQuantize {
            scale: 1.0,
            quantizer,
        };
        let y = linear_fake_quantized(x.clone(), &matrix, None, merge, Compute::F32);
        let expected = x.matmul(rounded(&w, format).transpose());
        close(&y, &expected, &format!("{format} without update"));
    }
}

#[test]
fn rounding_for_a_format_and_for_the_products_are_two_roundings() {
    let [tokens, out, inner] = [20, 150, 160];
    let (x, w) = (random([tokens, inner]), coarse([out, inner]));
    let matrix = Arc::new(Matrix::from_f32(out, inner, &values(&w)));
    let merge = FakeQuantize {
        scale: 1.0,
        quantizer: "gguf:q4_0".parse().unwrap(),
    };
    for compute in [Compute::Bf16, Compute::F16, Compute::Fp8(Scales::F32)] {
        let y = linear_fake_quantized(x.clone(), &matrix, None, merge, compute);
        let twice = Matrix::from_f32(out, inner, &values(&rounded(&w, "gguf:q4_0")));
        let expected = linear_frozen(x.clone(), &Arc::new(twice), compute);
        close(&y, &expected, &format!("{compute:?}"));
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "one setup for two formats")]
fn merged_experts_are_those_of_the_rounded_sums() {
    let [tokens, experts, top_k, hidden, inner, rank] = [270, 4, 2, 64, 32, 3];
    for format in ["gguf:q4_0", "fp8"] {
        let weights_of =
            |rows, cols| -> Vec<Tensor<2>> { (0..experts).map(|_| coarse([rows, cols])).collect() };
        let (gate, up, down) = (
            weights_of(inner, hidden),
            weights_of(inner, hidden),
            weights_of(hidden, inner),
        );
        let matrices = |list: &[Tensor<2>]| -> Vec<Matrix> {
            let of = |w: &Tensor<2>| Matrix::from_f32(w.dims()[0], w.dims()[1], &values(w));
            list.iter().map(of).collect()
        };
        let bank = Arc::new(ExpertBank::new(
            matrices(&gate),
            matrices(&up),
            matrices(&down),
        ));
        let (x, weights) = (random([tokens, hidden]), random([tokens, top_k]));
        let (ga, gb, da, db) = (
            coarse([experts, rank, hidden]),
            coarse([experts, inner, rank]),
            coarse([experts, rank, inner]),
            coarse([experts, hidden, rank]),
        );
        let (routing, one_hot) = routing(tokens, experts, top_k, weights.clone());
        let lora = ExpertLora {
            scale: [0.5, 0.0, 2.0],
            dropout: Dropout::OFF,
            quantizer: Some(format.parse().unwrap()),
        };
        let each = |list: &[Tensor<2>], update: Option<Tensor<3>>| {
            let of = |(e, w): (usize, &Tensor<2>)| match &update {
                Some(all) => {
                    let [_, rows, cols] = all.dims();
                    let own = all.clone().slice([e..e + 1, 0..rows, 0..cols]);
                    straight_through(w, own.reshape([rows, cols]), format)
                }
                None => rounded(w, format),
            };
            Tensor::stack::<3>(list.iter().enumerate().map(of).collect(), 0)
        };
        agree!(
            format!("experts in {format}"),
            [x, weights, ga, gb, da, db],
            experts_frozen(
                x.clone(),
                Routing {
                    weights: weights.clone(),
                    ..routing.clone()
                },
                &bank,
                ExpertFactors {
                    gate: Some([ga.clone(), gb.clone()]),
                    up: None,
                    down: Some([da.clone(), db.clone()])
                },
                lora,
                Compute::F32
            ),
            plain_experts(
                x.clone(),
                weights.clone(),
                one_hot.clone(),
                [
                    each(&gate, Some(gb.clone().matmul(ga.clone()) * 0.5)),
                    each(&up, None),
                    each(&down, Some(db.clone().matmul(da.clone()) * 2.0)),
                ]
            )
        );
    }
}

/// A matrix of E4M3 codes whose values are multiples of an eighth, with ragged blocks of different scales.
fn coarse_fp8(rows: usize, cols: usize) -> Matrix {
    let codes: Vec<u8> = (0..rows * cols)
        .map(|i| f32_to_e4m3(((i * 7919 % 17) as f32 - 8.0) / 8.0))
        .collect();
    let grid = [rows.div_ceil(128), cols.div_ceil(128)];
    let scales = (0..grid[0] * grid[1]).map(|i| 2f32.powi(i as i32 % 3));
    Matrix::fp8(
        [rows, cols],
        codes.into(),
        scales.collect(),
        &grid,
        [128, 128],
    )
    .unwrap()
}

#[test]
fn updates_are_folded_onto_fp8_weights_and_fp8_alone_is_left_as_it_is() {
    for [tokens, out, inner] in [[30, 200, 300], [600, 300, 130], [1, 64, 257]] {
        let matrix = Arc::new(coarse_fp8(out, inner));
        let w = dense(&matrix);
        let (x, a, b) = (
            random([tokens, inner]),
            coarse([2, inner]),
            coarse([out, 2]),
        );
        let merge = FakeQuantize {
            scale: 2.0,
            quantizer: "fp8".parse().unwrap(),
        };
        agree!(
            format!("fp8 onto fp8 of {out} × {inner}"),
            [x, a, b],
            linear_fake_quantized(
                x.clone(),
                &matrix,
                Some([a.clone(), b.clone()]),
                merge,
                Compute::F32
            ),
            x.clone()
                .matmul(straight_through(&w, b.clone().matmul(a.clone()) * 2.0, "fp8").transpose())
        );
        // The codes are what a merge copies: other scales would be as good, but not the same.
        let y = linear_fake_quantized(x.clone(), &matrix, None, merge, Compute::F32);
        let expected = linear_frozen(x.clone(), &matrix, Compute::F32);
        assert_eq!(values(&y), values(&expected));
    }
}
