//! TER: how many edits turn a text into its reference, in relation to the reference's length.
//!
//! An edit inserts, deletes or replaces a word, or shifts a block of words that the reference has elsewhere. The fewest edits
//! would take too long to find, so shifts are chosen one after the other: of all shifts of a block to a place that the
//! reference suggests, the one after which the fewest edits of words remain, until none saves any. Edits of words are counted
//! near the diagonal of the table of text and reference, and the number of shifts that are tried has a limit.
//!
//! Source: Snover et al., AMTA 2006; which blocks and places are tried, the order of shifts that save equally much, and all
//! limits: mjpost/sacrebleu 2.5.1: sacrebleu/metrics/ter.py, sacrebleu/metrics/lib_ter.py, with the defaults of `corpus_ter`.
//! They decide the score, so they are the same here.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::words::words;

/// Words of the longest block that is shifted.
const MOST_SHIFTED_WORDS: usize = 10;
/// Words between a block's places in the text and in the reference, at most.
const LONGEST_SHIFT: usize = 50;
/// Shifts that are tried for one text and reference; the block at which they are reached is tried to its end.
const MOST_TRIED_SHIFTS: usize = 1000;
/// Words from the diagonal within which edits are counted.
const LEAST_BEAM: f64 = 25.0;
/// The edits of what is not counted: more than all others.
const UNCOUNTED: usize = usize::MAX / 2;

/// One sentence's counts for TER, or their sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerCounts {
    /// Edits that turn the text into the reference that needs the fewest.
    pub edits: u64,
    /// Words of the references, on average.
    pub reference_words: f64,
}

/// The counts of a text; without references as with an empty one.
pub(crate) fn ter_counts(text: &str, references: &[&str]) -> TerCounts {
    let mut numbers = HashMap::new();
    let text = numbered_words(text, &mut numbers);
    let references: Vec<Vec<usize>> = references
        .iter()
        .map(|reference| numbered_words(reference, &mut numbers))
        .collect();
    let edits = references
        .iter()
        .map(|reference| fewest_edits(&text, reference));
    let n_words: usize = references.iter().map(Vec::len).sum();
    TerCounts {
        edits: edits.min().unwrap_or(text.len()) as u64,
        reference_words: n_words as f64 / references.len().max(1) as f64,
    }
}

/// TER of a corpus, in percent of the references' words, and so above 100 if more is to be edited; 100 if there are edits but
/// no such words.
pub(crate) fn ter(counts: impl Iterator<Item = TerCounts>) -> f64 {
    let sum = counts.fold(TerCounts::default(), |sum, counts| TerCounts {
        edits: sum.edits + counts.edits,
        reference_words: sum.reference_words + counts.reference_words,
    });
    let rate = if sum.reference_words > 0.0 {
        sum.edits as f64 / sum.reference_words
    } else if sum.edits > 0 {
        1.0
    } else {
        0.0
    };
    100.0 * rate
}

/// A text's words in lower case, each as a number of its own.
fn numbered_words(text: &str, numbers: &mut HashMap<String, usize>) -> Vec<usize> {
    let text = text.to_lowercase();
    let number = |word: &str| {
        let next = numbers.len();
        *numbers.entry(word.to_owned()).or_insert(next)
    };
    words(&text).map(number).collect()
}

fn fewest_edits(text: &[usize], reference: &[usize]) -> usize {
    if reference.is_empty() {
        return text.len();
    }
    let mut table = EditTable::new(text, reference);
    let (mut n_shifts, mut n_tried) = (0, 0);
    while let Some(best) = best_shift(&table, &mut n_tried) {
        // What is best when the limit is reached is not done, even if it would save edits.
        if n_tried >= MOST_TRIED_SHIFTS || best.edits_after >= table.n_edits() {
            break;
        }
        best.apply(&mut table.text);
        table.count_from(best.changed().start);
        n_shifts += 1;
    }
    n_shifts + table.n_edits()
}

/// The best of the shifts that may be tried.
fn best_shift(table: &EditTable<'_>, n_tried: &mut usize) -> Option<BlockShift> {
    let alignment = table.alignment();
    let blocks = common_blocks(&table.text, table.reference);
    let mut best: Option<BlockShift> = None;
    for block in blocks.filter(|block| alignment.may_shift(block)) {
        for target in alignment.targets(&block) {
            let tried = BlockShift::new(table, &block, target);
            *n_tried += 1;
            if best.is_none_or(|best| tried.rank() > best.rank()) {
                best = Some(tried);
            }
        }
        if *n_tried >= MOST_TRIED_SHIFTS {
            break;
        }
    }
    best
}

/// Words that a text and its reference have in common, one after the other.
#[derive(Clone, Copy)]
struct CommonBlock {
    start: usize,
    reference_start: usize,
    n_words: usize,
}

impl CommonBlock {
    fn in_text(&self) -> Range<usize> {
        self.start..self.start + self.n_words
    }

    fn in_reference(&self) -> Range<usize> {
        self.reference_start..self.reference_start + self.n_words
    }
}

/// All of them that are neither too large nor too far from each other, in the order in which they are tried.
fn common_blocks(text: &[usize], reference: &[usize]) -> impl Iterator<Item = CommonBlock> {
    (0..text.len()).flat_map(move |start| {
        let nearest = start.saturating_sub(LONGEST_SHIFT);
        let end = reference.len().min(start + LONGEST_SHIFT + 1);
        (nearest..end).flat_map(move |reference_start| {
            let pairs = text[start..].iter().zip(&reference[reference_start..]);
            let n_common = pairs
                .take(MOST_SHIFTED_WORDS)
                .take_while(|(word, expected)| word == expected)
                .count();
            (1..=n_common).map(move |n_words| CommonBlock {
                start,
                reference_start,
                n_words,
            })
        })
    })
}

/// A block on its way to another place.
#[derive(Clone, Copy)]
struct BlockShift {
    start: usize,
    n_words: usize,
    /// The place before which it is put, counted before the shift.
    target: usize,
    /// Where it starts after the shift.
    new_start: usize,
    edits_after: usize,
}

impl BlockShift {
    fn new(table: &EditTable<'_>, block: &CommonBlock, target: usize) -> Self {
        let (start, n_words) = (block.start, block.n_words);
        let new_start = match target > start + n_words {
            true => target - n_words,
            // A place inside the block counts from the words after it, of which there may be fewer.
            false => target.min(table.text.len() - n_words),
        };
        let mut tried = Self {
            start,
            n_words,
            target,
            new_start,
            edits_after: UNCOUNTED,
        };
        let mut text = table.text.clone();
        tried.apply(&mut text);
        tried.edits_after = table.edits_of(&text, tried.changed().start);
        tried
    }

    /// Fewest edits; then the longest block, the first block, and the first place.
    fn rank(&self) -> impl Ord + use<> {
        let (start, target) = (Reverse(self.start), Reverse(self.target));
        (Reverse(self.edits_after), self.n_words, start, target)
    }

    /// The words among which the block is shifted.
    fn changed(&self) -> Range<usize> {
        let first = self.start.min(self.new_start);
        let last = self.start.max(self.new_start);
        first..last + self.n_words
    }

    fn apply(&self, text: &mut [usize]) {
        let words = &mut text[self.changed()];
        match self.new_start > self.start {
            true => words.rotate_left(self.n_words),
            false => words.rotate_right(self.n_words),
        }
    }
}

/// Which words of a text became which of its reference.
struct Alignment {
    /// Words that were edited.
    is_edited: Vec<bool>,
    is_reference_edited: Vec<bool>,
    /// For each number of the reference's first words, the number of the text's that became them.
    ends: Vec<usize>,
}

impl Alignment {
    /// Whether both places of a block have edits, and it is not shifted into itself.
    fn may_shift(&self, block: &CommonBlock) -> bool {
        let is_any = |edited: &[bool]| edited.iter().any(|is_edited| *is_edited);
        let end = self.ends[block.reference_start + 1];
        is_any(&self.is_edited[block.in_text()])
            && is_any(&self.is_reference_edited[block.in_reference()])
            && !(block.start < end && end <= block.start + block.n_words)
    }

    /// The places before which the block may be put: where its place in the reference starts and where each word of it ends.
    fn targets(&self, block: &CommonBlock) -> Vec<usize> {
        let Range { start, end } = block.in_reference();
        let mut targets = self.ends[start..=end].to_vec();
        targets.dedup();
        targets
    }
}

/// The fewest edits of words, without shifts, from the beginnings of a text to those of its reference.
///
/// Row `i` and column `j` are for the first `i` words of the text and the first `j` of the reference. All columns of the
/// first row are counted, and those near the diagonal of the others.
struct EditTable<'a> {
    text: Vec<usize>,
    reference: &'a [usize],
    rows: Vec<EditRow>,
    /// Words of the reference for each of the text.
    slope: f64,
    beam: usize,
}

/// The counted part of a row.
#[derive(Clone, Default)]
struct EditRow {
    first_column: usize,
    edits: Vec<usize>,
}

impl EditRow {
    fn edits(&self, column: usize) -> usize {
        let at = column.checked_sub(self.first_column);
        at.and_then(|at| self.edits.get(at).copied())
            .unwrap_or(UNCOUNTED)
    }
}

impl<'a> EditTable<'a> {
    fn new(text: &[usize], reference: &'a [usize]) -> Self {
        let slope = match text.len() {
            0 => 1.0,
            n_words => reference.len() as f64 / n_words as f64,
        };
        // Rows next to each other must share columns.
        let beam = match slope / 2.0 > LEAST_BEAM {
            true => (slope / 2.0 + LEAST_BEAM).ceil(),
            false => LEAST_BEAM,
        };
        let first_row = EditRow {
            first_column: 0,
            edits: (0..=reference.len()).collect(),
        };
        let mut table = Self {
            text: text.to_vec(),
            reference,
            rows: vec![first_row],
            slope,
            beam: beam as usize,
        };
        table.count_from(0);
        table
    }

    /// Edits of the whole text.
    fn n_edits(&self) -> usize {
        let last = self.rows.last();
        last.map_or(UNCOUNTED, |row| row.edits(self.reference.len()))
    }

    /// Counts again after the words from one on have changed.
    fn count_from(&mut self, word: usize) {
        self.rows.truncate(word + 1);
        for at in word..self.text.len() {
            let mut row = EditRow::default();
            self.count_row(at, self.text[at], &self.rows[at], &mut row);
            self.rows.push(row);
        }
    }

    /// Edits of a text with the same words up to one.
    fn edits_of(&self, text: &[usize], first_changed: usize) -> usize {
        let mut above = self.rows[first_changed].clone();
        let mut row = EditRow::default();
        for (at, word) in text.iter().enumerate().skip(first_changed) {
            self.count_row(at, *word, &above, &mut row);
            std::mem::swap(&mut above, &mut row);
        }
        above.edits(self.reference.len())
    }

    /// Counts the row below that of a word.
    fn count_row(&self, at: usize, word: usize, above: &EditRow, row: &mut EditRow) {
        let columns = self.columns(at + 1);
        row.first_column = columns.start;
        row.edits.clear();
        let mut inserted = UNCOUNTED;
        for column in columns {
            let deleted = above.edits(column) + 1;
            let replaced = match column.checked_sub(1) {
                Some(left) => above.edits(left) + usize::from(self.reference[left] != word),
                None => UNCOUNTED,
            };
            let edits = replaced.min(deleted).min(inserted).min(UNCOUNTED);
            row.edits.push(edits);
            inserted = edits + 1;
        }
    }

    /// The columns of a row that are counted.
    fn columns(&self, row: usize) -> Range<usize> {
        let diagonal = (row as f64 * self.slope).floor() as usize;
        let end = (diagonal + self.beam).min(self.reference.len() + 1);
        diagonal.saturating_sub(self.beam)..end
    }

    /// The edits themselves. Where several are as good, a replacement is before a deletion, and a deletion before an insertion.
    fn alignment(&self) -> Alignment {
        let (mut row, mut column) = (self.text.len(), self.reference.len());
        let mut alignment = Alignment {
            is_edited: vec![true; row],
            is_reference_edited: vec![true; column],
            ends: vec![0; column + 1],
        };
        while row > 0 && column > 0 {
            let (word, expected) = (row - 1, column - 1);
            let edits = self.rows[row].edits(column);
            let is_replaced = self.text[word] != self.reference[expected];
            if edits == self.rows[word].edits(expected) + usize::from(is_replaced) {
                alignment.is_edited[word] = is_replaced;
                alignment.is_reference_edited[expected] = is_replaced;
                alignment.ends[column] = row;
                (row, column) = (word, expected);
            } else if edits == self.rows[word].edits(column) + 1 {
                row = word;
            } else {
                alignment.ends[column] = row;
                column = expected;
            }
        }
        alignment
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::translation::golden::TranslationGolden;

    #[test]
    fn counts_and_scores_are_those_of_sacrebleu() {
        let golden = TranslationGolden::read();
        let counts = golden.counts(ter_counts);
        for (item, counts) in golden.items.iter().zip(&counts) {
            let found = [counts.edits as f64, counts.reference_words];
            assert_eq!(found.as_slice(), item.ter, "{item:?}");
        }
        golden.compare_scores(2, |chosen| ter(chosen.iter().map(|item| counts[*item])));
    }

    #[test]
    fn a_shift_is_one_edit() {
        let check = |text: &str, reference: &str, edits: u64| {
            assert_eq!(ter_counts(text, &[reference]).edits, edits, "{text:?}");
        };
        check("b c a", "a b c", 1);
        check("d e f a b c", "a b c d e f", 1);
        check("f a b c d E", "a b c d e F", 1);
        check("a b", "b c", 2);
        check("", "a b", 2);
        check("a b", " ", 2);
    }

    #[test]
    fn nothing_needs_no_edits() {
        assert_eq!(ter(std::iter::empty()), 0.0);
        assert_eq!(ter([ter_counts("", &[""])].into_iter()), 0.0);
        let alone = ter_counts("a b", &[]);
        assert_eq!((alone.edits, alone.reference_words), (2, 0.0));
        assert_eq!(ter([alone].into_iter()), 100.0);
    }
}
