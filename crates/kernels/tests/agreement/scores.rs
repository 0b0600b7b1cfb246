//! The greedy tokens of a head, next to its losses.

use moeforge_kernels::{TokenScores, token_scores_frozen, token_scores_trained};

use super::*;

#[test]
fn greedy_tokens_are_the_first_with_the_largest_logit() {
    for [tokens, vocab, hidden] in [[3, 5, 4], [140, 1100, 9], [530, 1030, 33]] {
        let (h, u, b) = (
            random([tokens, hidden]) * 2.0,
            random([tokens, 3]),
            random([vocab, 3]),
        );
        // The second half of the vocabulary repeats the first, so that every largest logit is there twice.
        let half = random([vocab / 2, hidden]) * 2.0;
        let rest = Tensor::zeros([vocab % 2, hidden], &device());
        let w = Tensor::cat(vec![half.clone(), half, rest], 0);
        let b = {
            let half = b.slice([0..vocab / 2, 0..3]);
            let rest = Tensor::zeros([vocab % 2, 3], &device());
            Tensor::cat(vec![half.clone(), half, rest], 0)
        };
        let targets = some_targets(tokens, vocab);
        let expect = |what: &str, scores: TokenScores, loss: Tensor<1>, logits: Tensor<2>| {
            // Blocks of a quantized weight do not repeat with its rows.
            let has_pairs = what == "trained";
            let logits = values(&logits);
            assert!(values(&scores.losses) == values(&loss), "{what}: losses");
            let found = scores.greedy.into_data().convert::<i32>();
            let found = found.try_to_vec::<i32>().unwrap();
            for (token, (found, target)) in found.iter().zip(&targets).enumerate() {
                let row = &logits[token * vocab..][..vocab];
                let largest = row
                    .iter()
                    .fold(f32::MIN, |largest, logit| largest.max(*logit));
                let found = *found as usize;
                let expected = match *target < 0 {
                    true => found == 0,
                    // Another order of sums may choose another pair, never the second of a pair.
                    false => {
                        (!(vocab / 2..vocab / 2 * 2).contains(&found) || !has_pairs)
                            && row[found] >= largest - TOLERANCE * largest.abs()
                    }
                };
                assert!(expected, "{what}, token {token} of {tokens}: {found}");
            }
        };
        let (ids, f32) = (ids(targets.clone(), [tokens]), Compute::F32);
        expect(
            "trained",
            token_scores_trained(h.clone(), w.clone(), ids.clone(), f32),
            cross_entropy_trained(h.clone(), w.clone(), ids.clone(), f32),
            h.clone().matmul(w.clone().transpose()),
        );
        for w in stored(&w) {
            let (dense, w) = (dense(&w), Arc::new(w));
            let low_rank = Some([u.clone(), b.clone()]);
            expect(
                w.format().name(),
                token_scores_frozen(h.clone(), low_rank.clone(), &w, ids.clone(), f32),
                cross_entropy_frozen(h.clone(), low_rank, &w, ids.clone(), f32),
                h.clone().matmul(dense.transpose()) + u.clone().matmul(b.clone().transpose()),
            );
        }
    }
}
