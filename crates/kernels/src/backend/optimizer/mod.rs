//! The optimizer's update and the norm of its gradients.

pub(crate) mod flex;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::is_gpu;
use crate::backend::traits::Kernels;
use crate::ops::adamw::AdamWStep;

/// One AdamW update of flat tensors, in place if no one else holds them. The moments may be bf16. Has no gradient.
///
/// # Shapes
/// - all `[n]`: parameter, gradient, first and second moment
/// - returns: parameter, first and second moment
///
/// # Panics
/// If the lengths differ.
pub fn adamw(
    p: Tensor<1>,
    g: Tensor<1>,
    [m, v]: [Tensor<1>; 2],
    step: AdamWStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    assert_eq!(
        (p.dims(), p.dims(), p.dims()),
        (g.dims(), m.dims(), v.dims()),
        "parameter, gradient and moments"
    );
    let (p, m, v) = Dispatch::adamw_step(
        p.into_dispatch(),
        g.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        step,
    );
    (
        Tensor::from_dispatch(p),
        [Tensor::from_dispatch(m), Tensor::from_dispatch(v)],
    )
}

/// The sum, in an order that depends on the length alone: burn's own adds in any order on a GPU.
///
/// # Shapes
/// - `x`: `[n]`
/// - returns: `[1]`
pub fn total(x: Tensor<1>) -> Tensor<1> {
    if !is_gpu(&x.device()) {
        return x.sum();
    }
    let [n] = x.dims();
    // Two sums of about the root of n each: software adapters end loops of more than 65,535 steps.
    let cols = n.isqrt().max(1);
    let rows = n.div_ceil(cols);
    let padding = Tensor::zeros([rows * cols - n], &x.device());
    let square = Tensor::cat(vec![x, padding], 0).reshape([rows, cols]);
    square.sum_dim(1).sum_dim(0).reshape([1])
}

/// The sums of squares of equal parts, in f64 and in an order that depends on a part's length alone.
///
/// # Shapes
/// - `x`: `[parts · n]`
/// - returns: `[parts]`
///
/// # Panics
/// If the parts are not equal.
pub fn sums_of_squares(x: Tensor<1>, parts: usize) -> Tensor<1> {
    assert!(
        x.dims()[0].is_multiple_of(parts),
        "{parts} equal parts of {} values",
        x.dims()[0]
    );
    Tensor::from_dispatch(Dispatch::sums_of_squares_f32(x.into_dispatch(), parts))
}
