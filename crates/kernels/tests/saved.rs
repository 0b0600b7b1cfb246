//! Which activations are saved for the backward pass, and which are recomputed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use burn::tensor::{Device, Distribution, Tensor};
use moeforge_kernels::fp8::Scales;
use moeforge_kernels::{Compute, linear_trained, rms_norm, saved_activation_bytes, swiglu};

const TOKENS: usize = 40;
const WIDTH: usize = 256;

/// The bytes that a norm and a feed-forward layer save in a forward pass, and the gradients of their backward pass.
fn feed_forward(compute: Compute) -> (usize, Vec<Tensor<2>>) {
    let device = Device::flex().autodiff();
    device.seed(1);
    let random = |shape: [usize; 2]| {
        Tensor::<2>::random(shape, Distribution::Uniform(-1.0, 1.0), &device).require_grad()
    };
    let (x, weight) = (random([TOKENS, WIDTH]), Tensor::<1>::ones([WIDTH], &device));
    let (gate, up, down) = (
        random([WIDTH, WIDTH]),
        random([WIDTH, WIDTH]),
        random([WIDTH, WIDTH]),
    );
    saved_activation_bytes();
    let before = saved_activation_bytes();
    let normed = rms_norm(x.clone(), weight, 1e-6);
    let linear = |x: Tensor<2>, w: &Tensor<2>| linear_trained(x, w.clone(), compute, compute);
    let act = swiglu(linear(normed.clone(), &gate), linear(normed, &up), compute);
    let y = linear(act, &down);
    let saved = saved_activation_bytes() - before;
    let grads = y.sum().backward();
    let grads = [x, gate, up, down].map(|x| x.grad(&grads).unwrap());
    saved_activation_bytes();
    assert_eq!(
        saved_activation_bytes(),
        before,
        "all saved activations are freed"
    );
    (saved, grads.to_vec())
}

/// One test, because the process has one counter.
#[test]
fn a_feed_forward_layer_saves_only_gate_and_up() {
    let numbers = 2 * TOKENS * WIDTH;
    let (f32_bytes, exact) = feed_forward(Compute::F32);
    assert_eq!(f32_bytes, 4 * numbers);
    let (bf16_bytes, bf16) = feed_forward(Compute::Bf16);
    assert_eq!(bf16_bytes, 2 * numbers);
    let (fp8_bytes, fp8) = feed_forward(Compute::Fp8(Scales::F32));
    // A scale of 4 bytes for 128 numbers.
    assert_eq!(fp8_bytes, numbers + numbers / 128 * 4);

    let error = |found: &[Tensor<2>]| {
        let pairs = found.iter().zip(&exact);
        let largest = pairs.map(|(found, exact)| {
            let difference = (found.clone() - exact.clone()).powi_scalar(2).sum();
            (difference / exact.clone().powi_scalar(2).sum()).sqrt()
        });
        largest
            .map(|error| error.into_scalar::<f32>())
            .fold(0.0, f32::max)
    };
    let (bf16, fp8) = (error(&bf16), error(&fp8));
    assert!(bf16 > 0.0 && bf16 < 0.01, "{bf16}");
    assert!(fp8 > bf16 && fp8 < 0.1, "{fp8}");
}
