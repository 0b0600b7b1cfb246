//! The cross-entropy loss of tokens against an output head.

pub(crate) mod autodiff;
pub(crate) mod flex;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor};

use crate::backend::factors;
use crate::backend::traits::Kernels;
use crate::formats::Matrix;
use crate::settings::Compute;

/// The loss of every token against a frozen head, `logits = h · wᵀ + u · bᵀ` with the low-rank update `[u, b]`.
///
/// # Shapes
/// - `h`: `[tokens, hidden_size]`, `u`: `[tokens, rank]`, `b`: `[vocab, rank]`
/// - `targets`: `[tokens]`, −100 for none
/// - returns: `[tokens]` in nats, 0 for a token without a target
///
/// # Panics
/// If the sizes do not fit or a target is not below `vocab`.
pub fn cross_entropy_frozen(
    h: Tensor<2>,
    low_rank: Option<[Tensor<2>; 2]>,
    w: &Arc<Matrix>,
    targets: Tensor<1, Int>,
    compute: Compute,
) -> Tensor<1> {
    assert_eq!(
        h.dims(),
        [targets.dims()[0], w.cols()],
        "tokens and width of the head"
    );
    let n_tokens = h.dims()[0];
    let (h, targets) = (h.into_dispatch(), targets.into_dispatch());
    let low_rank = low_rank.map(|pair| pair.map(Tensor::into_dispatch));
    let shapes = [[n_tokens, 0], [w.rows(), 0]];
    let [u, b] = factors::or_rank_zero::<Dispatch, 2>(low_rank, shapes, &h);
    let (loss, _lse) = Dispatch::cross_entropy_frozen(h, u, b, targets, Arc::clone(w), compute);
    Tensor::from_dispatch(loss)
}

/// The loss of every token against a trained head.
///
/// # Shapes
/// - `h`: `[tokens, hidden_size]`, `w`: `[vocab, hidden_size]`, `targets`: `[tokens]`, −100 for none
/// - returns: `[tokens]` in nats, 0 for a token without a target
///
/// # Panics
/// If the sizes do not fit or a target is not below `vocab`.
pub fn cross_entropy_trained(
    h: Tensor<2>,
    w: Tensor<2>,
    targets: Tensor<1, Int>,
    compute: Compute,
) -> Tensor<1> {
    assert_eq!(
        h.dims(),
        [targets.dims()[0], w.dims()[1]],
        "tokens and width of the head"
    );
    Tensor::from_dispatch(
        Dispatch::cross_entropy_trained(
            h.into_dispatch(),
            w.into_dispatch(),
            targets.into_dispatch(),
            compute,
        )
        .0,
    )
}
