//! Linear layers; see [`crate::backend::linear`]. Products with one weight are steps of the others, so a backend that
//! overrides those has all.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;

use crate::backend::gradients::{Gradients, UpdateGrads, UpdateSaved};
use crate::backend::plain::check_compute;
use crate::backend::plain::reals::Reals;
use crate::backend::plain::saved_reals::saved_values;
use crate::backend::saved::SavedActivation;
use crate::backend::traits::{Direction, HeadRows, Kernels, Update};
use crate::formats::Matrix;
use crate::settings::Compute;

/// `x · wᵀ`: `[tokens, in]` → `[tokens, out]`.
pub(crate) fn linear_frozen<B: Kernels>(
    x: FloatTensor<B>,
    w: &Matrix,
    compute: Compute,
) -> FloatTensor<B> {
    check_compute(compute);
    let x = Reals::<B>::new(x);
    let w = Reals::decoded(w, &x.device());
    x.matmul_t(w).into_tensor()
}

/// [`linear_frozen`] with two weights.
pub(crate) fn linear_frozen_pair<B: Kernels>(
    x: FloatTensor<B>,
    [first, second]: [Arc<Matrix>; 2],
    compute: Compute,
) -> (FloatTensor<B>, FloatTensor<B>) {
    (
        B::linear_frozen(x.clone(), first, compute),
        B::linear_frozen(x, second, compute),
    )
}

/// `x · wᵀ`: `[tokens, in]`, `[out, in]` → `[tokens, out]`.
pub(crate) fn linear_trained<B: Kernels>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    compute: Compute,
) -> FloatTensor<B> {
    check_compute(compute);
    Reals::<B>::new(x).matmul_t(Reals::new(w)).into_tensor()
}

/// `x · wᵀ + low · bᵀ` and `low = scale · x · aᵀ`: `[tokens, in]` → `[tokens, out]`, `[tokens, rank]`.
pub(crate) fn linear_updated<B: Kernels>(
    x: FloatTensor<B>,
    [a, b]: [FloatTensor<B>; 2],
    w: Arc<Matrix>,
    update: Update,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let low = Reals::<B>::new(x.clone()).matmul_t(Reals::new(a)) * update.scale;
    let low = low.into_tensor();
    let y = B::linear_frozen(x, w, update.compute);
    if low.shape()[1] == 0 {
        return (y, low);
    }
    (B::linear_add(y, low.clone(), b), low)
}

/// Never: a weight is not rounded on the device.
pub(crate) fn refuse_fake_quantization() -> ! {
    panic!("this backend does not round weights during training: fake quantization runs on the CPU")
}

/// `y + u · bᵀ`: `[tokens, out]`, `[tokens, rank]`, `[out, rank]` → `[tokens, out]`.
pub(crate) fn linear_add<B: Kernels>(
    y: FloatTensor<B>,
    u: FloatTensor<B>,
    b: FloatTensor<B>,
) -> FloatTensor<B> {
    if u.shape()[1] == 0 {
        return y;
    }
    (Reals::<B>::new(y) + Reals::new(u).matmul_t(Reals::new(b))).into_tensor()
}

/// `‖w_i + scale · b_i · a‖`: `[rank, in]`, `[out, rank]` → `[out]`.
pub(crate) fn row_norms<B: Kernels>(
    [a, b]: [FloatTensor<B>; 2],
    w: &Matrix,
    scale: f32,
) -> FloatTensor<B> {
    let (a, b) = (Reals::<B>::new(a), Reals::new(b));
    let w = Reals::decoded(w, &a.device()) + b.matmul(a) * scale;
    let [out, _] = w.dims();
    w.square().sum(1).sqrt().reshape(&[out]).into_tensor()
}

/// Each head with its own rows: `[tokens, heads, in]` → `[tokens, heads, len]`, or back.
pub(crate) fn heads_linear<B: Kernels>(
    x: FloatTensor<B>,
    w: &Matrix,
    rows: HeadRows,
    compute: Compute,
) -> FloatTensor<B> {
    check_compute(compute);
    let HeadRows {
        heads, start, len, ..
    } = rows;
    let x = Reals::<B>::new(x).permute(&[1, 0, 2]);
    let per_head = w.rows() / heads.max(1);
    let w = Reals::decoded(w, &x.device()).reshape(&[heads, per_head, w.cols()]);
    let w = w.narrow(1, start..start + len);
    let y = match rows.direction {
        Direction::Forward => x.matmul_t(w),
        Direction::Transposed => x.matmul(w),
    };
    y.permute(&[1, 0, 2]).into_tensor()
}

/// `dy · w`: `[tokens, out]` → `[tokens, in]`.
pub(crate) fn linear_frozen_dx<B: Gradients>(
    dy: FloatTensor<B>,
    w: &Matrix,
    compute: Compute,
) -> FloatTensor<B> {
    check_compute(compute);
    let dy = Reals::<B>::new(dy);
    let w = Reals::decoded(w, &dy.device());
    dy.matmul(w).into_tensor()
}

/// `dy · w`: `[tokens, out]`, `[out, in]` → `[tokens, in]`.
pub(crate) fn linear_trained_dx<B: Gradients>(
    dy: FloatTensor<B>,
    w: FloatTensor<B>,
    compute: Compute,
) -> FloatTensor<B> {
    check_compute(compute);
    Reals::<B>::new(dy).matmul(Reals::new(w)).into_tensor()
}

/// `dyᵀ · x`: `[tokens, out]`, `[tokens, in]` → `[out, in]`.
pub(crate) fn linear_dw<B: Gradients>(
    dy: FloatTensor<B>,
    x: &SavedActivation<FloatTensor<B>>,
    compute: Compute,
) -> FloatTensor<B> {
    check_compute(compute);
    let x = Reals::new(saved_values::<B>(x));
    Reals::<B>::new(dy).t().matmul(x).into_tensor()
}

/// With `dlow = scale · dy · b`: `dx = dy · w + dlow · a`, `da = dlowᵀ · x`, `db = dyᵀ · low`.
pub(crate) fn linear_updated_grads<B: Gradients>(
    dy: FloatTensor<B>,
    saved: UpdateSaved<FloatTensor<B>>,
    low: FloatTensor<B>,
    (w, update): (&Matrix, Update),
    want_x: bool,
) -> UpdateGrads<FloatTensor<B>> {
    let (values, [a, b]) = (Reals::<B>::new(dy.clone()), saved.factors.map(Reals::new));
    let dlow = values.clone().matmul(b) * update.scale;
    let grads = saved.x.as_deref().map(|x| {
        let x = Reals::new(saved_values::<B>(x));
        let da = dlow.clone().t().matmul(x);
        let db = values.t().matmul(Reals::new(low));
        [da, db].map(Reals::into_tensor)
    });
    let dx = want_x.then(|| {
        let dx = Reals::<B>::new(B::linear_frozen_dx(dy, w, update.compute));
        (dx + dlow.matmul(a)).into_tensor()
    });
    (dx, grads)
}
