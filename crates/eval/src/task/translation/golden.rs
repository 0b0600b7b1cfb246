//! Sentences, their counts and the scores of corpora, as sacrebleu has them.

use serde_json::Value;

/// What `translation_metrics.py` makes.
const GOLDEN_FILE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../tests/goldens/translation_metrics.json"
);
/// Rounding: the same sums and logarithms, in another order at most.
const SCORE_TOLERANCE: f64 = 1e-9;

/// A text, its references, and sacrebleu's counts in its order.
#[derive(Debug)]
pub(crate) struct TranslationItem {
    text: String,
    references: Vec<String>,
    pub(crate) bleu: Vec<u64>,
    pub(crate) chrf: Vec<u64>,
    /// Edits, and the references' mean length.
    pub(crate) ter: Vec<f64>,
}

/// Items, and the scores of some of them together.
pub(crate) struct TranslationGolden {
    pub(crate) items: Vec<TranslationItem>,
    /// Places of items, and BLEU, chrF and TER.
    corpora: Vec<(Vec<usize>, Vec<f64>)>,
}

impl TranslationGolden {
    pub(crate) fn read() -> Self {
        let file = std::fs::read_to_string(GOLDEN_FILE).unwrap();
        let golden: Value = serde_json::from_str(&file).unwrap();
        let item = |value: &Value| TranslationItem {
            text: value[0].as_str().unwrap().into(),
            references: list(&value[1], |text| text.as_str().unwrap().into()),
            bleu: list(&value[2], |n| n.as_u64().unwrap()),
            chrf: list(&value[3], |n| n.as_u64().unwrap()),
            ter: list(&value[4], |n| n.as_f64().unwrap()),
        };
        let corpus = |value: &Value| {
            let places = list(&value[0], |place| place.as_u64().unwrap() as usize);
            (places, list(&value[1], |score| score.as_f64().unwrap()))
        };
        Self {
            items: list(&golden["items"], item),
            corpora: list(&golden["corpora"], corpus),
        }
    }

    pub(crate) fn counts<T>(&self, counts: impl Fn(&str, &[&str]) -> T) -> Vec<T> {
        let of_item = |item: &TranslationItem| {
            let references: Vec<&str> = item.references.iter().map(String::as_str).collect();
            counts(&item.text, &references)
        };
        self.items.iter().map(of_item).collect()
    }

    /// Compares every corpus's score with that of its items.
    pub(crate) fn compare_scores(&self, metric: usize, score: impl Fn(&[usize]) -> f64) {
        assert!(self.items.len() >= 150 && self.corpora.len() >= self.items.len());
        for (places, scores) in &self.corpora {
            let (found, expected) = (score(places), scores[metric]);
            assert!(
                (found - expected).abs() < SCORE_TOLERANCE,
                "{places:?}: {found}, not {expected}"
            );
        }
    }
}

fn list<T>(value: &Value, of_each: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().unwrap().iter().map(of_each).collect()
}
