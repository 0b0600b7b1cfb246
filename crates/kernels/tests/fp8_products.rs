//! Products in FP8 against burn's products of operands that are rounded by the codec.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::sync::Arc;

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use moeforge_kernels::fp8::{Scales, encode_tiles};
use moeforge_kernels::{
    Compute, Dropout, ExpertBank, ExpertFactors, ExpertLora, Format, Matrix, Routing, dispatch,
    experts_frozen, experts_trained, linear_frozen, linear_trained, swiglu,
};
use safetensors::SafeTensors;

const WEIGHTS: [usize; 2] = [128, 128];
const ROWS: [usize; 2] = [1, 128];
const COLUMNS: [usize; 2] = [128, 1];

fn device() -> Device {
    Device::flex().autodiff()
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device())
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    x.clone().into_data().try_to_vec().unwrap()
}

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// A matrix rounded to FP8 tiles.
fn rounded(x: &Tensor<2>, tile: [usize; 2], kind: Scales) -> Tensor<2> {
    let [rows, cols] = x.dims();
    let tiles = encode_tiles(&values(x), [rows, cols], tile, kind);
    let mut decoded = vec![0.0; rows * cols];
    tiles.decode(0..rows, &mut decoded);
    tensor(decoded, [rows, cols])
}

/// f32 sums in another order.
fn close<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (values(found), values(expected));
    let size = expected.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (a - b).abs() <= 2e-5 * size,
            "{what} at {i}: {a}, expected {b}"
        );
    }
}

#[test]
fn linear_products_are_products_of_rounded_operands() {
    for kind in [Scales::F32, Scales::PowerOfTwo] {
        for [tokens, out, inner] in [[1, 5, 7], [9, 300, 130], [140, 17, 260], [300, 129, 64]] {
            let (x, w) = (
                random([tokens, inner]).require_grad(),
                random([out, inner]).require_grad(),
            );
            let y = linear_trained(x.clone(), w.clone(), Compute::Fp8(kind), Compute::Fp8(kind));
            let (x_rows, w_blocks) = (rounded(&x, ROWS, kind), rounded(&w, WEIGHTS, kind));
            close(
                &y,
                &x_rows.clone().matmul(w_blocks.clone().transpose()),
                "value",
            );

            let direction = random(y.dims());
            let grads = (y * direction.clone()).sum().backward();
            let dx = rounded(&direction, ROWS, kind).matmul(w_blocks);
            close(&x.grad(&grads).unwrap(), &dx, "gradient of x");
            // The saved input is already rounded along its rows.
            let x_columns = rounded(&x_rows, COLUMNS, kind);
            let dw = rounded(&direction, COLUMNS, kind)
                .transpose()
                .matmul(x_columns);
            close(&w.grad(&grads).unwrap(), &dw, "gradient of w");
        }
    }
}

/// A tensor's bytes from a file of the goldens.
fn golden(file: &str, name: &str) -> (Vec<u8>, Vec<usize>) {
    let bytes = std::fs::read(goldens::path("deepseek_v3_fp8").join(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    (tensor.data().to_vec(), tensor.shape().to_vec())
}

#[test]
fn a_product_with_a_published_weight_is_the_golden() {
    let floats = |(bytes, shape): (Vec<u8>, Vec<usize>)| {
        let values = bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        (values.collect::<Vec<_>>(), shape)
    };
    let key = "model.layers.1.mlp.experts.0.gate_proj.weight"; // `op_weight` in golden.json
    let (codes, shape) = golden("model-00001-of-000002.safetensors", key);
    let scale_key = format!("{key}_scale_inv");
    let (scales, grid) = floats(golden("model-00002-of-000002.safetensors", &scale_key));
    let shape = [shape[0], shape[1]];
    let w = Matrix::fp8(shape, codes.into(), scales, &grid, WEIGHTS).unwrap();
    let (x, dims) = floats(golden("golden.safetensors", "op.x"));
    let (expected, out) = floats(golden("golden.safetensors", "op.y"));
    let x = tensor(x, [dims[0], dims[1]]);
    let y = linear_frozen(x, &Arc::new(w), Compute::Fp8(Scales::F32));
    close(&y, &tensor(expected, [out[0], out[1]]), "op.y");
}

/// A matrix in bf16, and its values.
fn bf16(rows: usize, cols: usize) -> (Matrix, Tensor<2>) {
    let x = random([rows, cols]);
    let halves = values(&x).into_iter().map(half::bf16::from_f32);
    let bytes: Vec<u8> = halves.flat_map(half::bf16::to_le_bytes).collect();
    let matrix = Matrix::dense(rows, cols, Format::Bf16, bytes.into()).unwrap();
    let dense = tensor(matrix.to_f32(), [rows, cols]);
    (matrix, dense)
}

#[test]
fn frozen_weights_are_rounded_unless_they_are_fp8() {
    let kind = Scales::F32;
    let (x, (bf16, dense)) = (random([9, 200]).require_grad(), bf16(150, 200));
    let codes: Vec<u8> = (0..150 * 200).map(|i| (i * 59 % 120) as u8).collect();
    let fp8 = Matrix::fp8(
        [150, 200],
        codes.into(),
        vec![0.01; 20],
        &[10, 2],
        [16, 128],
    )
    .unwrap();
    let as_it_is = tensor(fp8.to_f32(), [150, 200]);
    for (w, expected) in [(bf16, rounded(&dense, WEIGHTS, kind)), (fp8, as_it_is)] {
        let y = linear_frozen(x.clone(), &Arc::new(w), Compute::Fp8(kind));
        let rows = rounded(&x, ROWS, kind);
        close(&y, &rows.matmul(expected.clone().transpose()), "value");
        let direction = random(y.dims());
        let grads = (y * direction.clone()).sum().backward();
        let dx = rounded(&direction, ROWS, kind).matmul(expected);
        close(&x.grad(&grads).unwrap(), &dx, "gradient of x");
    }
}

const N_EXPERTS: usize = 3;
const HIDDEN: usize = 140;
const INNER: usize = 136;

/// One expert per token in turn, each with weight 1.
fn turns(tokens: usize) -> Routing {
    let ids = (0..tokens)
        .map(|i| (i % N_EXPERTS) as i32)
        .collect::<Vec<_>>();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [tokens, 1]), &device());
    let (order, offsets) = dispatch(ids, N_EXPERTS);
    let weights = Tensor::ones([tokens, 1], &device());
    Routing {
        weights,
        order,
        offsets,
        part: None,
    }
}

/// The rows of the tokens that go to an expert.
fn of_expert(x: &Tensor<2>, expert: usize) -> Tensor<2> {
    let [tokens, _] = x.dims();
    let rows: Vec<i32> = (expert..tokens)
        .step_by(N_EXPERTS)
        .map(|i| i as i32)
        .collect();
    let n = rows.len();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [n]), &device());
    x.clone().select(0, rows)
}

/// Experts equal separate linear layers: the same products, the same rounding. Their backward pass reads the saved
/// products of gate and up in FP8, so gradients agree to that rounding.
#[test]
fn trained_experts_are_linear_layers_side_by_side() {
    let (tokens, compute) = (400, Compute::Fp8(Scales::F32));
    let x = random([tokens, HIDDEN]).require_grad();
    let stack = |out, inner| {
        (random([N_EXPERTS, out, inner]) * 0.1)
            .detach()
            .require_grad()
    };
    let stacks = [
        stack(INNER, HIDDEN),
        stack(INNER, HIDDEN),
        stack(HIDDEN, INNER),
    ];
    let y = experts_trained(x.clone(), turns(tokens), stacks.clone(), compute);
    let direction = random([tokens, HIDDEN]);
    let found = (y.clone() * direction.clone()).sum().backward();
    for expert in 0..N_EXPERTS {
        let one = |stack: &Tensor<3>| {
            let [_, out, inner] = stack.dims();
            let one = stack.clone().detach().narrow(0, expert, 1);
            one.reshape([out, inner]).detach().require_grad()
        };
        let [gate, up, down] = stacks.each_ref().map(one);
        let xs = of_expert(&x, expert).detach();
        let linear = |x: Tensor<2>, w: &Tensor<2>| linear_trained(x, w.clone(), compute, compute);
        let act = swiglu(linear(xs.clone(), &gate), linear(xs, &up), compute);
        let expected = linear(act, &down);
        close(&of_expert(&y, expert), &expected, "value");
        let expected = (expected * of_expert(&direction, expert)).sum().backward();
        let pairs = stacks
            .iter()
            .zip([gate, up, down])
            .zip(["gate", "up", "down"]);
        for ((stack, w), name) in pairs {
            let all = stack.grad(&found).unwrap().narrow(0, expert, 1);
            let (found, expected) = (values(&all), values(&w.grad(&expected).unwrap()));
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
            let error = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            let relative = (error / norm(&mut expected.iter().copied())).sqrt();
            assert!(relative < 0.06, "gradient of {name}: {relative}");
        }
    }
}

#[test]
fn frozen_experts_compute_what_trained_ones_do() {
    let (tokens, compute) = (50, Compute::Fp8(Scales::PowerOfTwo));
    let x = random([tokens, HIDDEN]);
    let bank = |out, inner| {
        (0..N_EXPERTS)
            .map(|_| bf16(out, inner))
            .unzip::<_, _, Vec<_>, Vec<_>>()
    };
    let (gate, up, down) = (
        bank(INNER, HIDDEN),
        bank(INNER, HIDDEN),
        bank(HIDDEN, INNER),
    );
    let stacks = [&gate.1, &up.1, &down.1].map(|dense| Tensor::stack::<3>(dense.clone(), 0));
    let expected = experts_trained(x.clone(), turns(tokens), stacks, compute);
    let bank = ExpertBank::new(gate.0, up.0, down.0);
    let factors = ExpertFactors::default();
    let lora = ExpertLora {
        scale: [0.0; 3],
        dropout: Dropout::OFF,
        quantizer: None,
    };
    let y = experts_frozen(x, turns(tokens), &Arc::new(bank), factors, lora, compute);
    close(&y, &expected, "value");
}
