//! The cross-entropy loss of tokens against an output head.

pub(crate) mod autodiff;
pub(crate) mod flex;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::{FloatTensor, IntTensor};
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
    let [h, u, b] = frozen_head(h, low_rank, w, &targets);
    let (targets, w) = (targets.into_dispatch(), Arc::clone(w));
    let (loss, _lse) = Dispatch::cross_entropy_frozen(h, u, b, targets, w, compute);
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
    expect_sizes(&h, w.dims()[1], &targets);
    let [h, w] = [h, w].map(Tensor::into_dispatch);
    let (loss, _lse) = Dispatch::cross_entropy_trained(h, w, targets.into_dispatch(), compute);
    Tensor::from_dispatch(loss)
}

/// What a head says of the targets of tokens.
#[derive(Clone, Debug)]
pub struct TokenScores {
    /// `[tokens]`: the losses in nats, 0 for a token without a target.
    pub losses: Tensor<1>,
    /// `[tokens]`: the tokens with the largest logits, 0 where there is no target.
    pub greedy: Tensor<1, Int>,
}

/// [`cross_entropy_frozen`], and the most likely tokens; without gradients. Of equal logits the first counts.
///
/// # Shapes
/// See [`cross_entropy_frozen`].
///
/// # Panics
/// If the sizes do not fit or a target is not below `vocab`.
pub fn token_scores_frozen(
    h: Tensor<2>,
    low_rank: Option<[Tensor<2>; 2]>,
    w: &Arc<Matrix>,
    targets: Tensor<1, Int>,
    compute: Compute,
) -> TokenScores {
    let [h, u, b] = frozen_head(h, low_rank, w, &targets);
    let (targets, w) = (targets.into_dispatch(), Arc::clone(w));
    TokenScores::new(Dispatch::token_scores_frozen(h, u, b, targets, w, compute))
}

/// [`cross_entropy_trained`], and the most likely tokens; without gradients. Of equal logits the first counts.
///
/// # Shapes
/// See [`cross_entropy_trained`].
///
/// # Panics
/// If the sizes do not fit or a target is not below `vocab`.
pub fn token_scores_trained(
    h: Tensor<2>,
    w: Tensor<2>,
    targets: Tensor<1, Int>,
    compute: Compute,
) -> TokenScores {
    expect_sizes(&h, w.dims()[1], &targets);
    let [h, w] = [h, w].map(Tensor::into_dispatch);
    let targets = targets.into_dispatch();
    TokenScores::new(Dispatch::token_scores_trained(h, w, targets, compute))
}

impl TokenScores {
    fn new((losses, greedy): (FloatTensor<Dispatch>, IntTensor<Dispatch>)) -> Self {
        Self {
            losses: Tensor::from_dispatch(losses),
            greedy: Tensor::from_dispatch(greedy),
        }
    }
}

/// Hidden states and factors of a frozen head; rank 0 without an update.
fn frozen_head(
    h: Tensor<2>,
    low_rank: Option<[Tensor<2>; 2]>,
    w: &Matrix,
    targets: &Tensor<1, Int>,
) -> [FloatTensor<Dispatch>; 3] {
    expect_sizes(&h, w.cols(), targets);
    let shapes = [[h.dims()[0], 0], [w.rows(), 0]];
    let h = h.into_dispatch();
    let low_rank = low_rank.map(|pair| pair.map(Tensor::into_dispatch));
    let [u, b] = factors::or_rank_zero::<Dispatch, 2>(low_rank, shapes, &h);
    [h, u, b]
}

fn expect_sizes(h: &Tensor<2>, width: usize, targets: &Tensor<1, Int>) {
    let expected = [targets.dims()[0], width];
    assert_eq!(h.dims(), expected, "tokens and width of the head");
}
