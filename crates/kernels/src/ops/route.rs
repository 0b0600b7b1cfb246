//! Choosing experts, and sorting the chosen (token, expert) slots by expert.
//!
//! Both return integer tables whose size depends on shapes only: `tokens × top_k` slots, `experts + 1` offsets. So the
//! tables can stay on the device, and no caller has to wait for their content.
//!
//! Choosing is discrete and has no gradient. Weighting the chosen experts is differentiable and is done above,
//! by gathering the scores at the chosen ids.

use rayon::prelude::*;

/// Top-k routing: how the experts of a token are chosen from its scores.
///
/// Source: DeepSeek-V2 (arXiv:2405.04434) section 2.2 and DeepSeek-V3 (arXiv:2412.19437) section 2.1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopK {
    /// Experts per token.
    pub top_k: usize,
    /// Groups of consecutive experts; 1 for no groups.
    pub n_group: usize,
    /// Groups a token may choose from.
    pub topk_group: usize,
    /// How groups are scored.
    pub group_score: GroupScore,
}

/// The score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best score (V2's `group_limited_greedy`).
    Max,
    /// The sum of its two best scores (V3's `noaux_tc`).
    TopTwoSum,
}

/// The chosen experts of every token, best first: scores `[tokens, experts]` → ids `[tokens, top_k]`.
///
/// If scores are equal, the lower expert wins. NaN counts as the lowest score, so that ids are always valid.
pub(crate) fn choose(scores: &[f32], experts: usize, choice: TopK) -> Vec<i32> {
    let mut ids = vec![0; scores.len() / experts * choice.top_k];
    ids.par_chunks_mut(choice.top_k * 64)
        .zip(scores.par_chunks(experts * 64))
        .for_each(|(ids, scores)| {
            let mut open = vec![true; experts];
            for (ids, scores) in ids.chunks_mut(choice.top_k).zip(scores.chunks(experts)) {
                mark_open_groups(scores, choice, &mut open);
                take_best(scores, &mut open, ids);
            }
        });
    ids
}

/// Marks the experts of the `topk_group` best groups.
fn mark_open_groups(scores: &[f32], choice: TopK, open: &mut [bool]) {
    open.fill(choice.n_group <= 1);
    if choice.n_group <= 1 {
        return;
    }
    let size = scores.len() / choice.n_group;
    let worth: Vec<f32> = scores
        .chunks(size)
        .map(|group| group_worth(group, choice.group_score))
        .collect();
    let mut closed = vec![true; choice.n_group];
    let mut best = vec![0; choice.topk_group];
    take_best(&worth, &mut closed, &mut best);
    for group in best {
        open[group as usize * size..][..size].fill(true);
    }
}

fn group_worth(group: &[f32], score: GroupScore) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &score in group {
        if score > first {
            (first, second) = (score, first);
        } else if score > second {
            second = score;
        }
    }
    match score {
        GroupScore::Max => first,
        GroupScore::TopTwoSum => first + if group.len() > 1 { second } else { 0.0 },
    }
}

/// Writes the ids of the best open scores, best first, and closes them.
fn take_best(scores: &[f32], open: &mut [bool], ids: &mut [i32]) {
    for id in ids {
        let mut best: Option<usize> = None;
        for (expert, score) in scores
            .iter()
            .enumerate()
            .filter(|(expert, _)| open[*expert])
        {
            let better = |b: usize| *score > scores[b] || (scores[b].is_nan() && !score.is_nan());
            if best.is_none_or(better) {
                best = Some(expert);
            }
        }
        let best =
            best.expect("top_k is at most the number of open experts: checked with the config");
        open[best] = false;
        *id = best as i32;
    }
}

/// Slots sorted by expert, stable: ids `[tokens, top_k]` → slot order `[slots]` and offsets `[experts + 1]`.
///
/// Slot `token × top_k + j` is token's j-th choice. Expert `e` serves `order[offsets[e]..offsets[e + 1]]`.
pub(crate) fn dispatch(ids: &[i32], experts: usize) -> (Vec<i32>, Vec<i32>) {
    let mut offsets = vec![0i32; experts + 1];
    ids.iter().for_each(|id| offsets[*id as usize + 1] += 1);
    (0..experts).for_each(|expert| offsets[expert + 1] += offsets[expert]);
    let mut next = offsets.clone();
    let mut order = vec![0; ids.len()];
    for (slot, id) in ids.iter().enumerate() {
        let at = &mut next[*id as usize];
        order[*at as usize] = slot as i32;
        *at += 1;
    }
    (order, offsets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn groups_limit_the_choice() {
        let choice = |group_score| TopK {
            top_k: 2,
            n_group: 3,
            topk_group: 1,
            group_score,
        };
        // The best single expert sits in group 1, the best pair in group 0.
        let scores = [0.5, 0.6, 0.9, 0.0, 0.3, 0.3];
        assert_eq!(choose(&scores, 6, choice(GroupScore::Max)), [2, 3]);
        assert_eq!(choose(&scores, 6, choice(GroupScore::TopTwoSum)), [1, 0]);
    }

    #[test]
    fn ties_and_nan_still_choose_distinct_experts() {
        let choice = TopK {
            top_k: 3,
            n_group: 1,
            topk_group: 1,
            group_score: GroupScore::Max,
        };
        assert_eq!(choose(&[0.1, 0.4, 0.4, 0.1], 4, choice), [1, 2, 0]);
        assert_eq!(
            choose(&[f32::NAN, 0.4, f32::NAN, 0.1], 4, choice),
            [1, 3, 0]
        );
    }

    #[test]
    fn every_slot_is_dispatched_once_to_its_expert() {
        let choice = TopK {
            top_k: 3,
            n_group: 1,
            topk_group: 1,
            group_score: GroupScore::Max,
        };
        for tokens in [0, 1, 65, 200] {
            let ids = choose(&noise(tokens * 7, 9), 7, choice);
            let (order, offsets) = dispatch(&ids, 7);
            let mut seen = order.clone();
            seen.sort_unstable();
            assert!(seen.iter().enumerate().all(|(i, slot)| i as i32 == *slot));
            for expert in 0..7 {
                let slots = &order[offsets[expert] as usize..offsets[expert + 1] as usize];
                assert!(
                    slots
                        .iter()
                        .all(|slot| ids[*slot as usize] == expert as i32)
                );
                assert!(slots.is_sorted());
            }
        }
    }
}
