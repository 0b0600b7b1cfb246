//! BLEU: the precision of n-grams of one to four words.
//!
//! The score of a corpus is the geometric mean of the four precisions, times a penalty if the texts are shorter than their
//! references. Texts are divided into words as by mteval-v13a of WMT. A precision of zero is smoothed: it is half of what one
//! correct n-gram would give, a quarter at the next order without one, and so on.
//!
//! Source: Papineni et al., ACL 2002, P02-1040; smoothing: Chen and Cherry, W14-3346, method 3; words, closest reference and
//! what is done without counts: mjpost/sacrebleu 2.5.1: sacrebleu/metrics/bleu.py, sacrebleu/tokenizers/tokenizer_13a.py,
//! with the defaults of `corpus_bleu`.

use std::collections::HashMap;

use data::is_space;
use serde::{Deserialize, Serialize};

use super::words::words;

/// Words of the longest n-grams.
const BLEU_ORDERS: usize = 4;

/// One sentence's counts for BLEU, or their sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BleuCounts {
    /// Words of the text.
    pub hypothesis_words: u64,
    /// Words of the reference whose number of words is closest to the text's; the smaller of two that are equally close.
    pub reference_words: u64,
    /// The text's n-grams of 1, 2, 3 and 4 words that a reference has too, each at most as often as one reference has it.
    pub correct: [u64; BLEU_ORDERS],
    /// The text's n-grams of 1, 2, 3 and 4 words.
    pub total: [u64; BLEU_ORDERS],
}

/// The counts of a text; without references nothing is correct, and they have no words.
pub(crate) fn bleu_counts(text: &str, references: &[&str]) -> BleuCounts {
    let text = divided(text);
    let text: Vec<&str> = words(&text).collect();
    let references: Vec<String> = references.iter().map(|text| divided(text)).collect();
    let references: Vec<Vec<&str>> = references
        .iter()
        .map(|text| words(text).collect())
        .collect();

    let mut limits: HashMap<&[&str], u64> = HashMap::new();
    for (ngram, n) in references.iter().flat_map(|words| counted_ngrams(words)) {
        let limit = limits.entry(ngram).or_default();
        *limit = n.max(*limit);
    }
    let n_words = references.iter().map(Vec::len);
    let closest = n_words.min_by_key(|n_words| (n_words.abs_diff(text.len()), *n_words));
    let mut counts = BleuCounts {
        hypothesis_words: text.len() as u64,
        reference_words: closest.unwrap_or(0) as u64,
        ..BleuCounts::default()
    };
    for (ngram, n) in counted_ngrams(&text) {
        let order = ngram.len() - 1;
        counts.total[order] += n;
        counts.correct[order] += n.min(limits.get(ngram).copied().unwrap_or(0));
    }
    counts
}

/// BLEU of a corpus, in percent; 0 if no word is correct, or no text has four words.
pub(crate) fn bleu(counts: impl Iterator<Item = BleuCounts>) -> f64 {
    let sum = counts.fold(BleuCounts::default(), sum);
    if sum.correct == [0; BLEU_ORDERS] {
        return 0.0;
    }
    let mut smoothing = 1.0;
    let mut log_precisions = 0.0;
    for (correct, total) in sum.correct.into_iter().zip(sum.total) {
        let precision = match (correct, total) {
            (_, 0) => return 0.0,
            (0, total) => {
                smoothing *= 2.0;
                100.0 / (smoothing * total as f64)
            }
            (correct, total) => 100.0 * correct as f64 / total as f64,
        };
        log_precisions += precision.ln();
    }
    let penalty = match sum.hypothesis_words < sum.reference_words {
        true => (1.0 - sum.reference_words as f64 / sum.hypothesis_words as f64).exp(),
        false => 1.0,
    };
    penalty * (log_precisions / BLEU_ORDERS as f64).exp()
}

fn sum(one: BleuCounts, other: BleuCounts) -> BleuCounts {
    let sums = |one: [u64; BLEU_ORDERS], other: [u64; BLEU_ORDERS]| {
        std::array::from_fn(|order| one[order] + other[order])
    };
    BleuCounts {
        hypothesis_words: one.hypothesis_words + other.hypothesis_words,
        reference_words: one.reference_words + other.reference_words,
        correct: sums(one.correct, other.correct),
        total: sums(one.total, other.total),
    }
}

/// How often each n-gram of one to four words comes.
fn counted_ngrams<'a, 'b>(words: &'b [&'a str]) -> HashMap<&'b [&'a str], u64> {
    let mut counts = HashMap::new();
    for ngram in (1..=BLEU_ORDERS).flat_map(|order| words.windows(order)) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

/// A text with white space between what mteval-v13a takes for words.
fn divided(text: &str) -> String {
    let text = text
        .trim_end_matches(is_space)
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">");

    // A space at each end, so that marks there have a neighbor.
    let mut apart = String::from(" ");
    for c in text.chars() {
        match is_symbol(c) {
            true => apart.extend([' ', c, ' ']),
            false => apart.push(c),
        }
    }
    apart.push(' ');

    // Periods and commas are words of their own unless digits are on both sides, and hyphens are after digits.
    let is_digit = |c: char| c.is_ascii_digit();
    let is_stop = |c: char| matches!(c, '.' | ',');
    let apart = rewrite_pairs(&apart, |a, b| {
        (!is_digit(a) && is_stop(b)).then_some([a, ' ', b, ' '])
    });
    let apart = rewrite_pairs(&apart, |a, b| {
        (is_stop(a) && !is_digit(b)).then_some([' ', a, ' ', b])
    });
    rewrite_pairs(&apart, |a, b| {
        (is_digit(a) && b == '-').then_some([a, ' ', b, ' '])
    })
}

/// Whether a character is a word wherever it stands: ASCII's punctuation except apostrophe, comma, hyphen and period.
fn is_symbol(c: char) -> bool {
    c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.')
}

/// Rewrites pairs of neighbors from the left; as with a regular expression, no character is in two of them.
fn rewrite_pairs(text: &str, rewritten: impl Fn(char, char) -> Option<[char; 4]>) -> String {
    let mut result = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match chars.peek().and_then(|next| rewritten(c, *next)) {
            Some(pair) => {
                result.extend(pair);
                chars.next();
            }
            None => result.push(c),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::translation::golden::TranslationGolden;

    #[test]
    fn counts_and_scores_are_those_of_sacrebleu() {
        let golden = TranslationGolden::read();
        let counts = golden.counts(bleu_counts);
        for (item, counts) in golden.items.iter().zip(&counts) {
            let mut found = vec![counts.hypothesis_words, counts.reference_words];
            found.extend(counts.correct.iter().chain(&counts.total));
            assert_eq!(found, item.bleu, "{item:?}");
        }
        golden.compare_scores(0, |chosen| bleu(chosen.iter().map(|item| counts[*item])));
    }

    #[test]
    fn words_are_those_of_mteval() {
        let check = |text: &str, expected: &[&str]| {
            let divided = divided(text);
            let found: Vec<&str> = words(&divided).collect();
            assert_eq!(found, expected, "{text:?}");
        };
        check("1,000.5, 3.", &["1,000.5", ",", "3", "."]);
        check("U.S. ..", &["U", ".", "S", ".", ".", "."]);
        check("&amp;lt;b&quot;", &["<", "b", "\""]);
        check(
            "well-\nknown 3-4 a-b it's",
            &["wellknown", "3", "-", "4", "a-b", "it's"],
        );
        check("<skipped>x-\n", &["x-"]);
        check("\u{ff0c}\u{ff0e}", &["\u{ff0c}\u{ff0e}"]);
        check("", &[]);
    }

    #[test]
    fn nothing_has_no_score() {
        assert_eq!(bleu(std::iter::empty()), 0.0);
        let alone = bleu_counts("a b c d e", &[]);
        assert_eq!((alone.reference_words, alone.correct), (0, [0; 4]));
        assert_eq!(alone.total, [5, 4, 3, 2]);
        assert_eq!(bleu([alone].into_iter()), 0.0);
        let one = bleu_counts("a b c", &["a b c"]);
        assert_eq!(bleu([one].into_iter()), 0.0);
    }
}
