//! Reports that nobody should trust: none of them makes a check panic.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/fuzz/mutation.rs"]
mod mutation;

use moeforge_eval::recompute;
use mutation::{Dice, mutated, mutated_json};
use serde_json::{Value, json};

const ROUNDS: u64 = 2000;

/// A report of two models with a number of each kind, few enough items for nothing to be drawn.
fn report() -> Value {
    let metric = |name: &str, aggregation: &str, of_items: Value| json!({"filter": "none", "metric": name, "aggregation": aggregation, "is_higher_better": true, "of_items": of_items});
    let bleu = json!({"hypothesis_words": 4, "reference_words": 5, "correct": [3, 2, 1, 0], "total": [4, 3, 2, 1]});
    let ter = json!({"edits": 2, "reference_words": 5.0});
    let model = |name: &str| {
        json!({
            "name": name,
            "text": {"bytes": 40, "per_sample": [{"loss_sum": 3.0, "tokens": 2}, {"loss_sum": 4.5, "tokens": 3}]},
            "tasks": [{
                "task": "t", "version": "1", "fewshot": 2, "n": 2, "n_rows": 9, "n_cut": 0, "read": 10, "asked": 20,
                "metrics": [
                    metric("acc", "mean", json!([1.0, 0.0])),
                    metric("bleu", "bleu", json!([bleu, bleu])),
                    metric("ter", "ter", json!([ter, ter])),
                    metric("bits_per_byte", "bits_per_byte", json!([[-3.0, 8], [-2.5, 9]])),
                ],
            }],
            "groups": [{"group": "g", "alias": null, "tasks": ["t"], "metrics": [{"filter": "none", "metric": "acc", "by_size": true}]}],
        })
    };
    let routing = json!([{"model": "b", "baseline": "a", "tokens": 3, "layers": [{"layer": 1, "changed": 0.5, "load_divergence": 0.1}]}]);
    json!({"models": [model("a"), model("b")], "gates": [{"gate": "t acc >= base - 0.5"}], "routing": routing})
}

#[test]
fn reports_are_read_or_refused() {
    // All that is missing is computed, so it differs; nothing is refused.
    let valid = report();
    assert!(!recompute(&valid).unwrap().is_empty());
    let valid = valid.to_string().into_bytes();
    let (mut read, mut refused) = (0, 0);
    for seed in 0..ROUNDS {
        let mut dice = Dice::new(seed);
        let bytes = match seed.is_multiple_of(4) {
            true => mutated(&valid, &mut dice),
            false => mutated_json(&valid, &mut dice),
        };
        let Ok(report) = serde_json::from_slice(&bytes) else {
            continue;
        };
        match recompute(&report) {
            Ok(_) => read += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(
        read > 100 && refused > 100,
        "{read} read, {refused} refused"
    );
}
