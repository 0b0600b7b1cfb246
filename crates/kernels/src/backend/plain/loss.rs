//! The loss of a language model, over a part of the vocabulary at a time; see [`crate::backend::loss`].
//!
//! `loss[t] = log Σ_v exp(logit_v) − logit_target`, with the sum relative to a running maximum. The gradients recompute
//! the logits from the saved log-sum-exp. Tokens without a target are computed too, and count for nothing.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::backend::gradients::{Gradients, LossSaved};
use crate::backend::plain::check_compute;
use crate::backend::plain::ints::{Ints, Mask};
use crate::backend::plain::reals::Reals;
use crate::backend::plain::sums::parts;
use crate::backend::traits::Kernels;
use crate::formats::Matrix;
use crate::ops::loss::IGNORED;
use crate::settings::Compute;

/// The most vocabulary entries of a part, and the most logits: 128 MiB.
const MOST_VOCAB: usize = 1 << 14;
const MOST_LOGITS: usize = 1 << 25;

/// The weight of an output head, `[vocab, hidden]`.
#[derive(Clone)]
pub(crate) enum HeadWeight<'a, B: Kernels> {
    Frozen(&'a Matrix),
    Trained(FloatTensor<B>),
}

/// `logits = h · wᵀ + u · bᵀ`: h `[tokens, hidden]`, u `[tokens, rank]`, b `[vocab, rank]`.
pub(crate) struct PlainHead<'a, B: Kernels> {
    pub(crate) h: Reals<B>,
    pub(crate) w: HeadWeight<'a, B>,
    pub(crate) update: Option<[Reals<B>; 2]>,
    /// Vocabulary entries of a part.
    pub(crate) part: usize,
}

impl<'a, B: Kernels> PlainHead<'a, B> {
    pub(crate) fn new(
        h: FloatTensor<B>,
        w: HeadWeight<'a, B>,
        low_rank: Option<[FloatTensor<B>; 2]>,
        compute: Compute,
    ) -> Self {
        check_compute(compute);
        let h = Reals::<B>::new(h);
        let [tokens, _] = h.dims();
        let update = low_rank.map(|pair| pair.map(Reals::new));
        Self {
            h,
            w,
            update: update.filter(|[u, _]| u.dims::<2>()[1] > 0),
            part: (MOST_LOGITS / tokens.max(1)).clamp(1, MOST_VOCAB),
        }
    }

    fn vocab(&self) -> usize {
        match &self.w {
            HeadWeight::Frozen(w) => w.rows(),
            HeadWeight::Trained(w) => Reals::<B>::new(w.clone()).dims::<2>()[0],
        }
    }

    fn tokens(&self) -> usize {
        self.h.dims::<2>()[0]
    }

    /// `[tokens, vocab]`.
    fn logits(&self, vocab: Range<usize>) -> Reals<B> {
        let logits = match &self.w {
            HeadWeight::Frozen(w) => {
                let (h, w) = (self.h.clone(), Arc::new(w.row_range(vocab.clone())));
                Reals::new(B::linear_frozen(h.into_tensor(), w, Compute::F32))
            }
            HeadWeight::Trained(w) => {
                let w = Reals::new(w.clone()).narrow(0, vocab.clone());
                self.h.clone().matmul_t(w)
            }
        };
        match &self.update {
            Some([u, b]) => logits + u.clone().matmul_t(b.clone().narrow(0, vocab)),
            None => logits,
        }
    }
}

/// The targets of tokens.
struct Targets<B: Kernels> {
    /// `[tokens]`.
    ids: Ints<B>,
    /// `[tokens, 1]`: those without a target.
    ignored: Mask<B>,
}

impl<B: Kernels> Targets<B> {
    fn new(ids: IntTensor<B>) -> Self {
        let ids = Ints::<B>::new(ids);
        let n = ids.len();
        Self {
            ignored: ids.clone().equals(IGNORED).reshape(&[n, 1]),
            ids,
        }
    }

    /// 1 at each token's target, `[tokens, vocab]` of a part of the vocabulary.
    fn one_hot(&self, vocab: Range<usize>) -> Reals<B> {
        let entries = Ints::count(vocab.len(), &self.ids.device()).plus(vocab.start as i32);
        let targets = self.ids.clone().reshape(&[self.ids.len(), 1]);
        targets
            .equal(entries.reshape(&[1, vocab.len()]))
            .into_values()
    }

    /// Each token's logit at its target, `[tokens, 1]`; 0 if that is in another part.
    fn at(&self, logits: Reals<B>, vocab: Range<usize>) -> Reals<B> {
        let (n, len) = (self.ids.len(), vocab.len() as i32);
        let place = self.ids.clone().plus(-(vocab.start as i32));
        let below = place.clone().lower_than(0);
        let is_elsewhere = below.or(place.clone().lower_than(len).not());
        let found = logits.at(place.clamp(0, len - 1));
        found.filled(is_elsewhere.reshape(&[n, 1]), 0.0)
    }
}

/// What the logits of tokens say, `[tokens]` each; 0 for a token without a target.
struct Outcomes<B: Kernels> {
    loss: FloatTensor<B>,
    lse: FloatTensor<B>,
    /// The entry with the largest logit, the first of several; none if not wanted.
    greedy: Option<IntTensor<B>>,
}

impl<B: Kernels> Outcomes<B> {
    fn of(head: &PlainHead<'_, B>, targets: IntTensor<B>, wants_greedy: bool) -> Self {
        let (n, device) = (head.tokens(), head.h.device());
        if n == 0 {
            let nothing = || Reals::<B>::zeros(&[0], &device);
            return Self {
                loss: nothing().into_tensor(),
                lse: nothing().into_tensor(),
                greedy: wants_greedy.then(|| nothing().into_ints().into_tensor()),
            };
        }
        let targets = Targets::<B>::new(targets);
        let (mut seen, mut entries): (Option<[Reals<B>; 3]>, Option<Reals<B>>) = (None, None);
        for vocab in parts(head.vocab(), head.part) {
            let logits = head.logits(vocab.clone());
            let at = targets.at(logits.clone(), vocab.clone());
            let largest = logits.clone().max(1);
            if wants_greedy {
                let first = first_at(logits.clone(), largest.clone(), vocab);
                let known = entries.zip(seen.clone());
                entries = Some(match known {
                    None => first,
                    Some((known, [old, ..])) => {
                        known.replaced(&largest.clone().greater(old), first)
                    }
                });
            }
            seen = Some(match seen {
                None => {
                    let sum = (logits - largest.clone()).exp().sum(1);
                    [largest, sum, at]
                }
                Some([old, sum, found]) => {
                    let max = old.clone().larger(largest);
                    let faded = sum * (old - max.clone()).exp();
                    let sum = faded + (logits - max.clone()).exp().sum(1);
                    [max, sum, found + at]
                }
            });
        }
        let [max, sum, at] = seen.expect("a vocabulary");
        let of_trained = |values: Reals<B>| {
            let of_trained = values.filled(targets.ignored.clone(), 0.0);
            of_trained.reshape(&[n])
        };
        let lse = max + sum.log();
        Self {
            loss: of_trained(lse.clone() - at).into_tensor(),
            lse: of_trained(lse).into_tensor(),
            greedy: entries.map(|entries| of_trained(entries).into_ints().into_tensor()),
        }
    }
}

/// The first entry of a part of the vocabulary with the given logit, `[tokens, 1]`, as a whole number.
fn first_at<B: Kernels>(logits: Reals<B>, wanted: Reals<B>, vocab: Range<usize>) -> Reals<B> {
    let shape = logits.dims::<2>();
    let entries = Ints::<B>::count(vocab.len(), &logits.device()).plus(vocab.start as i32);
    let entries = -entries.reshape(&[1, vocab.len()]).into_values();
    let is_elsewhere = logits.equal(wanted.expand(&shape)).not();
    // The first entry is the largest of the negative ones, and none is below that of the end.
    let entries = entries
        .expand(&shape)
        .filled(is_elsewhere, -(vocab.end as f32));
    -entries.max(1)
}

/// Losses and log-sum-exps, `[tokens]`; 0 for a token without a target.
pub(crate) fn cross_entropy<B: Kernels>(
    head: &PlainHead<'_, B>,
    targets: IntTensor<B>,
) -> [FloatTensor<B>; 2] {
    let outcomes = Outcomes::of(head, targets, false);
    [outcomes.loss, outcomes.lse]
}

/// Losses and greedy tokens, `[tokens]`; 0 for a token without a target.
pub(crate) fn token_scores<B: Kernels>(
    head: &PlainHead<'_, B>,
    targets: IntTensor<B>,
) -> (FloatTensor<B>, IntTensor<B>) {
    let outcomes = Outcomes::of(head, targets, true);
    (outcomes.loss, outcomes.greedy.expect("it is wanted"))
}

/// Which gradients of a head's weights are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Inputs,
    /// And that of the weight.
    Weight,
    /// And that of `b`.
    Update,
}

/// The gradients of a head: of h, u, and of w or b.
pub(crate) struct HeadGrads<B: Kernels> {
    pub(crate) dh: Reals<B>,
    pub(crate) du: Reals<B>,
    pub(crate) dw: Reals<B>,
}

/// The gradients from those of the losses `[tokens]`: of a logit `(softmax − onehot) · dloss`.
pub(crate) fn head_grads<B: Gradients>(
    head: &PlainHead<'_, B>,
    (targets, lse): (IntTensor<B>, FloatTensor<B>),
    dloss: FloatTensor<B>,
    wanted: Wanted,
) -> HeadGrads<B> {
    let (n, device) = (head.tokens(), head.h.device());
    let ([_, hidden], rank) = (
        head.h.dims(),
        head.update.as_ref().map_or(0, |[u, _]| u.dims::<2>()[1]),
    );
    let mut dh = Reals::zeros(&[n, hidden], &device);
    let mut du = Reals::zeros(&[n, rank], &device);
    let mut dws = vec![];
    let width = match wanted {
        Wanted::Inputs => 0,
        Wanted::Weight => hidden,
        Wanted::Update => rank,
    };
    let rows = if wanted == Wanted::Inputs {
        0
    } else {
        head.vocab()
    };
    if n == 0 {
        let dw = Reals::zeros(&[rows, width], &device);
        return HeadGrads { dh, du, dw };
    }
    let targets = Targets::<B>::new(targets);
    let [lse, dloss] = [lse, dloss].map(|values| Reals::new(values).reshape(&[n, 1]));
    for vocab in parts(head.vocab(), head.part) {
        let p = (head.logits(vocab.clone()) - lse.clone()).exp();
        let dlogits = (p - targets.one_hot(vocab.clone())) * dloss.clone();
        let dlogits = dlogits.filled(targets.ignored.clone(), 0.0);
        dh = dh + back(&head.w, dlogits.clone(), vocab.clone());
        if let Some([u, b]) = &head.update {
            du = du + dlogits.clone().matmul(b.clone().narrow(0, vocab));
            if wanted == Wanted::Update {
                dws.push(dlogits.clone().t().matmul(u.clone()));
            }
        }
        if wanted == Wanted::Weight {
            dws.push(dlogits.t().matmul(head.h.clone()));
        }
    }
    let dw = if dws.is_empty() {
        Reals::zeros(&[rows, width], &device)
    } else {
        Reals::cat(dws, 0)
    };
    HeadGrads { dh, du, dw }
}

/// `dlogits · w` over a part of the vocabulary: `[tokens, vocab]` → `[tokens, hidden]`.
fn back<B: Gradients>(w: &HeadWeight<'_, B>, dlogits: Reals<B>, vocab: Range<usize>) -> Reals<B> {
    match w {
        HeadWeight::Frozen(w) => {
            let (dlogits, w) = (dlogits.into_tensor(), w.row_range(vocab));
            Reals::new(B::linear_frozen_dx(dlogits, &w, Compute::F32))
        }
        HeadWeight::Trained(w) => dlogits.matmul(Reals::new(w.clone()).narrow(0, vocab)),
    }
}

/// See [`Kernels::cross_entropy_frozen`].
pub(crate) fn cross_entropy_frozen<B: Kernels>(
    h: FloatTensor<B>,
    low_rank: [FloatTensor<B>; 2],
    targets: IntTensor<B>,
    w: &Matrix,
    compute: Compute,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let head = PlainHead::<B>::new(h, HeadWeight::Frozen(w), Some(low_rank), compute);
    let [loss, lse] = cross_entropy(&head, targets);
    (loss, lse)
}

/// See [`Kernels::cross_entropy_trained`].
pub(crate) fn cross_entropy_trained<B: Kernels>(
    h: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: IntTensor<B>,
    compute: Compute,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let head = PlainHead::<B>::new(h, HeadWeight::Trained(w), None, compute);
    let [loss, lse] = cross_entropy(&head, targets);
    (loss, lse)
}

/// See [`Kernels::token_scores_frozen`].
pub(crate) fn token_scores_frozen<B: Kernels>(
    h: FloatTensor<B>,
    low_rank: [FloatTensor<B>; 2],
    targets: IntTensor<B>,
    w: &Matrix,
    compute: Compute,
) -> (FloatTensor<B>, IntTensor<B>) {
    let head = PlainHead::<B>::new(h, HeadWeight::Frozen(w), Some(low_rank), compute);
    token_scores(&head, targets)
}

/// See [`Kernels::token_scores_trained`].
pub(crate) fn token_scores_trained<B: Kernels>(
    h: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: IntTensor<B>,
    compute: Compute,
) -> (FloatTensor<B>, IntTensor<B>) {
    let head = PlainHead::<B>::new(h, HeadWeight::Trained(w), None, compute);
    token_scores(&head, targets)
}

/// See [`Gradients::cross_entropy_with_gradients`].
pub(crate) fn cross_entropy_with_gradients<B: Gradients>(
    h: FloatTensor<B>,
    targets: IntTensor<B>,
    w: &Matrix,
    compute: Compute,
) -> [FloatTensor<B>; 3] {
    let head = PlainHead::<B>::new(h, HeadWeight::Frozen(w), None, compute);
    let [loss, lse] = cross_entropy(&head, targets.clone());
    let n = head.tokens();
    let ones = Reals::<B>::ones(&[n], &head.h.device()).into_tensor();
    let grads = head_grads(&head, (targets, lse.clone()), ones, Wanted::Inputs);
    [loss, lse, grads.dh.into_tensor()]
}

/// Rows times one factor each: `[tokens, width]`, `[tokens]` → `[tokens, width]`.
pub(crate) fn scaled_rows<B: Gradients>(
    x: FloatTensor<B>,
    factors: FloatTensor<B>,
) -> FloatTensor<B> {
    let (x, factors) = (Reals::<B>::new(x), Reals::new(factors));
    let n = factors.len();
    (x * factors.reshape(&[n, 1])).into_tensor()
}

/// See [`Gradients::cross_entropy_frozen_grads`].
pub(crate) fn cross_entropy_frozen_grads<B: Gradients>(
    dloss: FloatTensor<B>,
    saved: LossSaved<FloatTensor<B>, IntTensor<B>>,
    low_rank: [FloatTensor<B>; 2],
    (w, compute): (&Matrix, Compute),
    want_b: bool,
) -> [FloatTensor<B>; 3] {
    let head = PlainHead::<B>::new(saved.h, HeadWeight::Frozen(w), Some(low_rank), compute);
    let wanted = if want_b {
        Wanted::Update
    } else {
        Wanted::Inputs
    };
    let grads = head_grads(&head, (saved.targets, saved.lse), dloss, wanted);
    [grads.dh, grads.du, grads.dw].map(Reals::into_tensor)
}

/// See [`Gradients::cross_entropy_trained_grads`].
pub(crate) fn cross_entropy_trained_grads<B: Gradients>(
    dloss: FloatTensor<B>,
    saved: LossSaved<FloatTensor<B>, IntTensor<B>>,
    w: FloatTensor<B>,
    compute: Compute,
    want_w: bool,
) -> [FloatTensor<B>; 2] {
    let head = PlainHead::<B>::new(saved.h, HeadWeight::Trained(w), None, compute);
    let wanted = if want_w {
        Wanted::Weight
    } else {
        Wanted::Inputs
    };
    let grads = head_grads(&head, (saved.targets, saved.lse), dloss, wanted);
    [grads.dh, grads.dw].map(Reals::into_tensor)
}
