//! The loss, with the vocabulary in parts.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::tensor::IntTensor;

use super::{GRADIENT, ROWS, VALUE, all_close, close, ids, ints, noise, shape};
use crate::backend::gradients::{Gradients, LossSaved};
use crate::backend::plain::loss::{self, HeadWeight, PlainHead, Wanted};
use crate::backend::plain::reals::Reals;
use crate::backend::traits::Kernels;
use crate::settings::Compute;
use crate::testing;

const VOCAB: usize = 33;
const HIDDEN: usize = 21;
/// Parts of the vocabulary: one that cuts, and one that does not.
const PARTS: [usize; 2] = [10, 64];

/// Every third token from the second has no target.
fn targets(tokens: usize) -> IntTensor<Flex> {
    let target = |token: usize| {
        if token % 3 == 1 {
            -100
        } else {
            (token * 7 % VOCAB) as i32
        }
    };
    ids((0..tokens).map(target).collect(), &[tokens])
}

#[test]
fn frozen_heads_agree() {
    for (tokens, rank) in ROWS
        .into_iter()
        .flat_map(|tokens| [0, 3].map(|rank| (tokens, rank)))
    {
        let (h, targets) = (noise(&[tokens, HIDDEN], 1), targets(tokens));
        let [u, b] = [noise(&[tokens, rank], 2), noise(&[VOCAB, rank], 3)];
        let dloss = noise(&[tokens], 4);
        for w in testing::every_format(VOCAB, HIDDEN, 5) {
            let what = format!("{} of {tokens} tokens, rank {rank}", w.format().name());
            let (compute, w) = (Compute::F32, Arc::new(w));
            let (loss, lse) = Flex::cross_entropy_frozen(
                h.clone(),
                u.clone(),
                b.clone(),
                targets.clone(),
                Arc::clone(&w),
                compute,
            );
            let saved = LossSaved {
                h: h.clone(),
                targets: targets.clone(),
                lse: lse.clone(),
            };
            let low_rank = [u.clone(), b.clone()];
            for part in PARTS {
                let weight = HeadWeight::Frozen(&w);
                let mut head =
                    PlainHead::<Flex>::new(h.clone(), weight, Some(low_rank.clone()), compute);
                head.part = part;
                let found = loss::cross_entropy(&head, targets.clone());
                all_close(&found, &[loss.clone(), lse.clone()], VALUE, &what);
                if rank == 0 || tokens == 0 {
                    continue;
                }
                let expected = Flex::cross_entropy_frozen_grads(
                    dloss.clone(),
                    saved.clone(),
                    low_rank.clone(),
                    &w,
                    compute,
                    true,
                );
                let of = (targets.clone(), lse.clone());
                let found = loss::head_grads(&head, of, dloss.clone(), Wanted::Update);
                let found = [found.dh, found.du, found.dw].map(Reals::into_tensor);
                all_close(&found, &expected, GRADIENT, &what);
            }
            if rank == 0 {
                let found = loss::cross_entropy_with_gradients::<Flex>(
                    h.clone(),
                    targets.clone(),
                    &w,
                    compute,
                );
                let expected =
                    Flex::cross_entropy_with_gradients(h.clone(), targets.clone(), &w, compute);
                all_close(&found, &expected, GRADIENT, &what);
            }
        }
    }
}

#[test]
fn trained_heads_agree() {
    for tokens in ROWS {
        let (h, w, targets) = (
            noise(&[tokens, HIDDEN], 1),
            noise(&[VOCAB, HIDDEN], 2),
            targets(tokens),
        );
        let (dloss, compute) = (noise(&[tokens], 4), Compute::F32);
        let what = format!("{tokens} tokens");
        let (loss, lse) =
            Flex::cross_entropy_trained(h.clone(), w.clone(), targets.clone(), compute);
        let saved = LossSaved {
            h: h.clone(),
            targets: targets.clone(),
            lse: lse.clone(),
        };
        let grads = |want_w| {
            let plain = loss::cross_entropy_trained_grads::<Flex>;
            plain(dloss.clone(), saved.clone(), w.clone(), compute, want_w)
        };
        let expected = |want_w| {
            let (dloss, saved, w) = (dloss.clone(), saved.clone(), w.clone());
            Flex::cross_entropy_trained_grads(dloss, saved, w, compute, want_w)
        };
        assert_eq!(
            grads(false).each_ref().map(shape),
            expected(false).each_ref().map(shape)
        );
        if tokens > 0 {
            all_close(&grads(true), &expected(true), GRADIENT, &what);
        }
        for part in PARTS {
            let weight = HeadWeight::Trained(w.clone());
            let mut head = PlainHead::<Flex>::new(h.clone(), weight, None, compute);
            head.part = part;
            let found = loss::cross_entropy(&head, targets.clone());
            all_close(&found, &[loss.clone(), lse.clone()], VALUE, &what);
            if tokens > 0 {
                let of = (targets.clone(), lse.clone());
                let found = loss::head_grads(&head, of, dloss.clone(), Wanted::Weight);
                let found = [found.dh, found.dw].map(Reals::into_tensor);
                all_close(&found, &expected(true), GRADIENT, &what);
            }
        }
    }
}

#[test]
fn greedy_tokens_agree() {
    let compute = Compute::F32;
    for tokens in ROWS {
        let (h, targets) = (noise(&[tokens, HIDDEN], 1), targets(tokens));
        let [u, b] = [noise(&[tokens, 3], 2), noise(&[VOCAB, 3], 3)];
        let trained = noise(&[VOCAB, HIDDEN], 4);
        let frozen = Arc::new(testing::every_format(VOCAB, HIDDEN, 5).remove(0));
        let low_rank = [u.clone(), b.clone()];
        let (all, w) = ((h.clone(), targets.clone()), Arc::clone(&frozen));
        let of_frozen = Flex::token_scores_frozen(all.0, u, b, all.1, w, compute);
        let all = (h.clone(), trained.clone(), targets.clone());
        let of_trained = Flex::token_scores_trained(all.0, all.1, all.2, compute);
        for (weight, low_rank, (losses, greedy)) in [
            (HeadWeight::Frozen(&frozen), Some(low_rank), of_frozen),
            (HeadWeight::Trained(trained), None, of_trained),
        ] {
            for part in PARTS {
                let (weight, low_rank) = (weight.clone(), low_rank.clone());
                let mut head = PlainHead::<Flex>::new(h.clone(), weight, low_rank, compute);
                head.part = part;
                let found = loss::token_scores(&head, targets.clone());
                close(&found.0, &losses, VALUE, "losses");
                assert_eq!(ints(&found.1), ints(&greedy), "{tokens} tokens");
            }
        }
    }
}

#[test]
fn rows_are_scaled() {
    let (x, factors) = (noise(&[9, 5], 1), noise(&[9], 2));
    let found = loss::scaled_rows::<Flex>(x.clone(), factors.clone());
    close(&found, &Flex::scaled_rows(x, factors), 0.0, "scaled_rows");
}

#[test]
fn large_logits_of_tokens_without_a_target_spoil_nothing() {
    let tokens = 4;
    let mut h = testing::noise(tokens * HIDDEN, 1);
    h[HIDDEN..2 * HIDDEN].iter_mut().for_each(|h| *h *= 1e4);
    let (h, targets) = (super::tensor(h, &[tokens, HIDDEN]), targets(tokens));
    let w = testing::every_format(VOCAB, HIDDEN, 5).remove(0);
    let plain = loss::cross_entropy_with_gradients::<Flex>;
    let found = plain(h.clone(), targets.clone(), &w, Compute::F32);
    let expected = Flex::cross_entropy_with_gradients(h, targets, &w, Compute::F32);
    all_close(&found, &expected, GRADIENT, "one large row");
}
