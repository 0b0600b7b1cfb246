//! Choosing experts, and sorting their slots: the same numbers as on the CPU.

use burn::backend::Flex;
use burn::backend::Slice;

use super::{ids, ints, noise, shape, tensor};
use crate::backend::plain::primitives::Primitives;
use crate::backend::plain::route;
use crate::backend::traits::Kernels;
use crate::ops::route::{GroupScore, TopK};
use crate::testing;

const CHOICES: [(usize, TopK); 6] = [
    (1, choice(1, 1, 1, GroupScore::Max)),
    (7, choice(3, 1, 1, GroupScore::Max)),
    (12, choice(4, 4, 2, GroupScore::Max)),
    (12, choice(5, 4, 2, GroupScore::TopTwoSum)),
    (6, choice(2, 6, 3, GroupScore::TopTwoSum)),
    (40, choice(8, 8, 4, GroupScore::TopTwoSum)),
];

const fn choice(top_k: usize, n_group: usize, topk_group: usize, group_score: GroupScore) -> TopK {
    TopK {
        top_k,
        n_group,
        topk_group,
        group_score,
    }
}

fn check(scores: Vec<f32>, experts: usize, choice: TopK) {
    let scores = tensor(scores.clone(), &[scores.len() / experts, experts]);
    let found = route::choose_experts::<Flex>(scores.clone(), choice);
    let expected = Flex::choose_experts(scores, choice);
    assert_eq!(shape(&found), shape(&expected), "{choice:?}");
    assert_eq!(ints(&found), ints(&expected), "{choice:?} of {experts}");
}

#[test]
fn choices_are_the_same() {
    for (experts, choice) in CHOICES {
        for tokens in [0, 1, 9, 70] {
            let scores = testing::noise(tokens * experts, 1);
            check(scores.clone(), experts, choice);
            // Ties everywhere.
            let tied: Vec<f32> = scores.iter().map(|score| (score * 2.0).round()).collect();
            check(tied.clone(), experts, choice);
            // And what is no number, or not finite.
            let odd = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -0.0, f32::NAN];
            let mut odd = tied.iter().zip(odd.iter().cycle()).enumerate();
            let odd = odd
                .by_ref()
                .map(|(i, (tied, odd))| if i * i % 7 < 3 { *odd } else { *tied });
            check(odd.collect(), experts, choice);
        }
    }
}

#[test]
fn many_tokens_are_chosen_for_in_parts() {
    let (experts, choice) = (160, choice(3, 8, 3, GroupScore::Max));
    check(testing::noise(1400 * experts, 2), experts, choice);
}

#[test]
fn slots_are_sorted_the_same() {
    for (tokens, top_k, experts) in [(0, 2, 5), (1, 1, 1), (9, 3, 40), (700, 3, 7), (341, 3, 2)] {
        let chosen: Vec<i32> = testing::noise(tokens * top_k, 3)
            .iter()
            // The last expert has none, if there are several.
            .map(|v| {
                ((v.abs() * experts as f32) as i32)
                    .min(experts as i32 - 2)
                    .max(0)
            })
            .collect();
        let chosen = ids(chosen, &[tokens, top_k]);
        let (order, offsets) = route::dispatch_slots::<Flex>(chosen.clone(), experts);
        let (eorder, eoffsets) = Flex::dispatch_slots(chosen, experts);
        assert_eq!(
            ints(&order),
            ints(&eorder),
            "{tokens} × {top_k} over {experts}"
        );
        assert_eq!(
            ints(&offsets),
            ints(&eoffsets),
            "{tokens} × {top_k} over {experts}"
        );
        check_tables(&ints(&order), &ints(&offsets), top_k);
    }
}

/// The tables of slots, of which those of the last expert are served elsewhere.
fn check_tables(order: &[i32], offsets: &[i32], top_k: usize) {
    let n_experts = offsets.len() - 1;
    for own in [n_experts, n_experts - 1]
        .into_iter()
        .filter(|own| *own > 0)
    {
        let kept = &offsets[..own + 1];
        let table = Flex::slot_table(
            ids(order.to_vec(), &[order.len()]),
            ids(kept.to_vec(), &[own + 1]),
            top_k,
        );
        assert_eq!(table.n_experts, own);
        for (place, slot) in order.iter().enumerate() {
            let expert = (0..own)
                .find(|e| (place as i32) < kept[e + 1])
                .unwrap_or(own);
            assert_eq!(ints(&table.experts)[place], expert as i32);
            assert_eq!(ints(&table.tokens)[place], slot / top_k as i32);
            assert_eq!(ints(&table.places)[*slot as usize], place as i32);
        }
    }
}

#[test]
fn a_part_of_a_larger_tensor_is_read_as_its_own() {
    let whole = noise(&[20, 7], 4);
    let slices = [Slice::new(3, Some(12), 1), Slice::new(0, Some(7), 1)];
    let part = <Flex as burn::backend::ops::FloatTensorOps<Flex>>::float_slice(whole, &slices);
    let choice = CHOICES[1].1;
    let found = route::choose_experts::<Flex>(part.clone(), choice);
    assert_eq!(ints(&found), ints(&Flex::choose_experts(part, choice)));
}
