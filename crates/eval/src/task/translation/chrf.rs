//! chrF: the F-score of n-grams of one to six characters, without white space.
//!
//! The score of a corpus is that of the mean precision and the mean recall of all orders that both its texts and its
//! references have.
//!
//! Source: Popović, WMT 2015, W15-3049; orders that count, and the choice of a reference: mjpost/sacrebleu 2.5.1:
//! sacrebleu/metrics/chrf.py, with the defaults of `corpus_chrf`.

use serde::{Deserialize, Serialize};

use super::words::words;

/// Characters of the longest n-grams.
const CHRF_ORDERS: usize = 6;
/// Bits in which every character has a place. Six of them have place in 128.
const CHAR_BITS: u32 = 21;
/// The square of what recall weighs more than precision.
const BETA_SQUARED: f64 = 4.0;

/// One sentence's counts for chrF, or their sums: of n-grams of 1 to 6 characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChrfCounts {
    /// The text's n-grams; 0 for an order of which the reference has none.
    pub hypothesis: [u64; CHRF_ORDERS],
    /// The n-grams of the reference with the best score; the first of several.
    pub reference: [u64; CHRF_ORDERS],
    /// N-grams of both, each as often as both have it.
    pub matches: [u64; CHRF_ORDERS],
}

/// The counts of a text; all are 0 without references.
pub(crate) fn chrf_counts(text: &str, references: &[&str]) -> ChrfCounts {
    let text = sorted_ngrams(text);
    let counts = references.iter().map(|reference| {
        let reference = sorted_ngrams(reference);
        let mut counts = ChrfCounts::default();
        for order in 0..CHRF_ORDERS {
            let (of_text, of_reference) = (&text[order], &reference[order]);
            if !of_reference.is_empty() {
                counts.hypothesis[order] = of_text.len() as u64;
            }
            counts.reference[order] = of_reference.len() as u64;
            counts.matches[order] = n_matches(of_text, of_reference);
        }
        counts
    });
    let better = |best, next| match f_score(&next) > f_score(&best) {
        true => next,
        false => best,
    };
    counts.reduce(better).unwrap_or_default()
}

/// chrF of a corpus, in percent; 0 if no character matches.
pub(crate) fn chrf(counts: impl Iterator<Item = ChrfCounts>) -> f64 {
    f_score(&counts.fold(ChrfCounts::default(), sum))
}

fn sum(one: ChrfCounts, other: ChrfCounts) -> ChrfCounts {
    let sums = |one: [u64; CHRF_ORDERS], other: [u64; CHRF_ORDERS]| {
        std::array::from_fn(|order| one[order] + other[order])
    };
    ChrfCounts {
        hypothesis: sums(one.hypothesis, other.hypothesis),
        reference: sums(one.reference, other.reference),
        matches: sums(one.matches, other.matches),
    }
}

fn f_score(counts: &ChrfCounts) -> f64 {
    let (mut precision, mut recall, mut n_orders) = (0.0, 0.0, 0.0);
    for order in 0..CHRF_ORDERS {
        let (text, reference) = (counts.hypothesis[order], counts.reference[order]);
        if text > 0 && reference > 0 {
            let matches = counts.matches[order] as f64;
            precision += matches / text as f64;
            recall += matches / reference as f64;
            n_orders += 1.0;
        }
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / n_orders, recall / n_orders);
    // Rounded in sacrebleu's order, since rounding decides between references that are equally good.
    let score = (1.0 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall);
    100.0 * score
}

/// The n-grams of a text by order, each as the number that its characters are in a row, in ascending order.
fn sorted_ngrams(text: &str) -> [Vec<u128>; CHRF_ORDERS] {
    let chars: Vec<u128> = words(text)
        .flat_map(str::chars)
        .map(|c| u128::from(u32::from(c)))
        .collect();
    let number = |chars: &[u128]| {
        chars
            .iter()
            .fold(0, |number, char| number << CHAR_BITS | char)
    };
    std::array::from_fn(|order| {
        let mut ngrams: Vec<u128> = chars.windows(order + 1).map(number).collect();
        ngrams.sort_unstable();
        ngrams
    })
}

/// How many numbers two ascending lists have in common, each as often as both have it.
fn n_matches(one: &[u128], other: &[u128]) -> u64 {
    let mut rest = other.iter().peekable();
    let is_match = |number: &&u128| {
        while rest.next_if(|next| next < number).is_some() {}
        rest.next_if_eq(number).is_some()
    };
    one.iter().filter(is_match).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::translation::golden::TranslationGolden;

    #[test]
    fn counts_and_scores_are_those_of_sacrebleu() {
        let golden = TranslationGolden::read();
        let counts = golden.counts(chrf_counts);
        for (item, counts) in golden.items.iter().zip(&counts) {
            let of_order = |order: usize| {
                [
                    counts.hypothesis[order],
                    counts.reference[order],
                    counts.matches[order],
                ]
            };
            let found: Vec<u64> = (0..CHRF_ORDERS).flat_map(of_order).collect();
            assert_eq!(found, item.chrf, "{item:?}");
        }
        golden.compare_scores(1, |chosen| chrf(chosen.iter().map(|item| counts[*item])));
    }

    #[test]
    fn ngrams_match_as_often_as_both_have_them() {
        assert_eq!(n_matches(&[1, 1, 1, 3, 5], &[0, 1, 1, 2, 5, 5]), 3);
        assert_eq!(n_matches(&[], &[1]), 0);
        let counts = chrf_counts("\u{10ffff}\u{10ffff} \0a", &["\0a\u{10ffff}"]);
        assert_eq!(counts.matches, [3, 1, 0, 0, 0, 0]);
        assert_eq!(counts.hypothesis, [4, 3, 2, 0, 0, 0]);
    }

    #[test]
    fn nothing_has_no_score() {
        assert_eq!(chrf(std::iter::empty()), 0.0);
        assert_eq!(chrf_counts("a b", &[]), ChrfCounts::default());
        assert_eq!(chrf([chrf_counts(" ", &["\t"])].into_iter()), 0.0);
    }
}
