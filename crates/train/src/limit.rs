//! What this machine multiplies at most, as far as our own products know how: what a step's speed is a fraction of.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use kernels::Matrix;
use model::linear::{Frozen, Linear, Weight};
use model::{Compute, Pass};

/// Rows, outputs and sum of the product: large enough that nothing but multiplying counts.
const SIZE: usize = 2048;

/// Measures a linear layer of 2048 × 2048 f32 weights on 2048 tokens, on all threads, so many times; once more before,
/// which does not count.
///
/// Returns floating-point operations per second, a multiplication and its addition being two.
pub fn product_speeds(runs: usize) -> Vec<f64> {
    let device = Device::flex();
    let values: Vec<f32> = (0..SIZE * SIZE)
        .map(|i| (i % 97) as f32 / 97.0 - 0.5)
        .collect();
    let x = Tensor::<1>::from_floats(values.as_slice(), &device).reshape([SIZE, SIZE]);
    let linear = Linear {
        weight: Weight::Frozen(Frozen {
            matrix: Arc::new(Matrix::from_f32(SIZE, SIZE, &values)),
        }),
        bias: None,
        lora: None,
        quantizer: None,
    };
    let speed = || {
        let started = Instant::now();
        let y = linear.forward(x.clone(), &Pass::new(Compute::F32));
        // Reading a number waits for all of them, where a device computes by itself.
        let _ = y.slice([0..1, 0..1]).into_scalar::<f32>();
        2.0 * (SIZE as f64).powi(3) / started.elapsed().as_secs_f64()
    };
    speed();
    (0..runs).map(|_| speed()).collect()
}
