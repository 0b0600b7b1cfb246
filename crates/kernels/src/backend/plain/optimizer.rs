//! The optimizer's update, and the sum of squares; see [`crate::backend::optimizer`].

use burn::backend::tensor::FloatTensor;

use crate::backend::plain::reals::Reals;
use crate::backend::traits::Kernels;
use crate::ops::adamw::AdamWStep;

/// One update of parameter, first and second moment by the gradient, all `[n]`.
pub(crate) fn adamw_step<B: Kernels>(
    [p, g, m, v]: [FloatTensor<B>; 4],
    step: AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let [p, g, m, v] = [p, g, m, v].map(Reals::<B>::new);
    let [beta1, beta2] = step.betas;
    let correction = |beta: f64| 1.0 - beta.powf(step.number as f64);
    let size = (step.rate / correction(beta1)) as f32;
    let root = correction(beta2).sqrt() as f32;
    let keep = (1.0 - step.rate * step.weight_decay) as f32;
    let first_share = (1.0 - beta1) as f32;
    let g = g * step.gradient_scale as f32;
    let change = g.clone() - m.clone();
    // PyTorch's `lerp`, which is exact at the end that is nearer.
    let m = if first_share < 0.5 {
        m + change * first_share
    } else {
        g.clone() - change * (1.0 - first_share)
    };
    let v = v * beta2 as f32 + g.square() * (1.0 - beta2) as f32;
    let p = p * keep - m.clone() * size / (v.clone().sqrt() / root + step.eps as f32);
    (p.into_tensor(), m.into_tensor(), v.into_tensor())
}

/// The sums of squares of equal parts: `[parts · n]` → `[parts]`.
pub(crate) fn sums_of_squares<B: Kernels>(x: FloatTensor<B>, parts: usize) -> FloatTensor<B> {
    let x = Reals::<B>::new(x);
    if parts == 1 {
        return x.square().sum(0).into_tensor();
    }
    let n = x.len() / parts.max(1);
    let sums = x.square().reshape(&[parts, n]).sum(1);
    sums.reshape(&[parts]).into_tensor()
}
