//! One number of the values of all items.

use std::collections::BTreeMap;

use data::Aggregation;

use super::row_values::RowValue;
use super::translation::{bleu, chrf, ter};
use crate::error::{Error, Result};

/// The number, from values of which some may come several times; NaN if there are none.
///
/// # Errors
/// If the values are of another kind than the number needs.
pub(crate) fn aggregate(how: Aggregation, values: &[&RowValue]) -> Result<f64> {
    match how {
        Aggregation::Mean => mean(values),
        Aggregation::Perplexity => Ok((-mean(values)?).exp()),
        Aggregation::WeightedPerplexity => Ok((-weighted_mean(values)?).exp()),
        Aggregation::BitsPerByte => Ok(-weighted_mean(values)? / std::f64::consts::LN_2),
        Aggregation::F1 => f1(values),
        Aggregation::Mcc => mcc(values),
        Aggregation::Bleu => Ok(bleu(counts(
            values,
            "counts for BLEU",
            |value| match value {
                RowValue::Bleu(counts) => Some(*counts),
                _ => None,
            },
        )?)),
        Aggregation::Chrf => Ok(chrf(counts(
            values,
            "counts for chrF",
            |value| match value {
                RowValue::Chrf(counts) => Some(*counts),
                _ => None,
            },
        )?)),
        Aggregation::Ter => Ok(ter(counts(
            values,
            "counts for TER",
            |value| match value {
                RowValue::Ter(counts) => Some(*counts),
                _ => None,
            },
        )?)),
    }
}

/// The counts of all values.
fn counts<T>(
    values: &[&RowValue],
    expected: &'static str,
    of: impl Fn(&RowValue) -> Option<T>,
) -> Result<impl Iterator<Item = T>> {
    let counts = values
        .iter()
        .map(|value| of(value).ok_or_else(|| other(expected, value)));
    Ok(counts.collect::<Result<Vec<T>>>()?.into_iter())
}

fn other(expected: &'static str, found: &RowValue) -> Error {
    let found = match found {
        RowValue::Number(_) => "numbers",
        RowValue::Weighted(..) => "numbers with weights",
        RowValue::Labels(..) => "labels",
        RowValue::Bleu(_) | RowValue::Chrf(_) | RowValue::Ter(_) => "counts of n-grams or edits",
    };
    Error::Aggregation { expected, found }
}

fn mean(values: &[&RowValue]) -> Result<f64> {
    let mut sum = 0.0;
    for value in values {
        match value {
            RowValue::Number(number) => sum += number,
            found => return Err(other("numbers", found)),
        }
    }
    Ok(sum / values.len() as f64)
}

fn weighted_mean(values: &[&RowValue]) -> Result<f64> {
    let (mut sum, mut weights) = (0.0, 0.0);
    for value in values {
        match value {
            RowValue::Weighted(number, weight) => {
                sum += number;
                weights += weight;
            }
            found => return Err(other("numbers with weights", found)),
        }
    }
    Ok(sum / weights)
}

fn labels(values: &[&RowValue]) -> Result<Vec<(i64, i64)>> {
    let label = |value: &&RowValue| match value {
        RowValue::Labels(right, chosen) => Ok((*right, *chosen)),
        found => Err(other("labels", found)),
    };
    values.iter().map(label).collect()
}

/// The harmonic mean of precision and recall of label 1 among labels 0 and 1; 0 if there is no label 1.
fn f1(values: &[&RowValue]) -> Result<f64> {
    let labels = labels(values)?;
    let is_binary = |label: &i64| (0..=1).contains(label);
    if !labels
        .iter()
        .all(|(right, chosen)| is_binary(right) && is_binary(chosen))
    {
        return Err(Error::Aggregation {
            expected: "labels 0 and 1",
            found: "others",
        });
    }
    let count = |wanted: (i64, i64)| labels.iter().filter(|label| **label == wanted).count() as f64;
    let (hits, all) = (
        count((1, 1)),
        2.0 * count((1, 1)) + count((0, 1)) + count((1, 0)),
    );
    Ok(if all == 0.0 { 0.0 } else { 2.0 * hits / all })
}

/// Matthews' correlation coefficient, of any number of labels; 0 if all are the same.
///
/// Source: Gorodkin, Computational Biology and Chemistry 28 (2004).
fn mcc(values: &[&RowValue]) -> Result<f64> {
    let labels = labels(values)?;
    let mut counts: BTreeMap<i64, [f64; 2]> = BTreeMap::new();
    for (right, chosen) in &labels {
        counts.entry(*right).or_default()[0] += 1.0;
        counts.entry(*chosen).or_default()[1] += 1.0;
    }
    let n = labels.len() as f64;
    let hits = labels
        .iter()
        .filter(|(right, chosen)| right == chosen)
        .count() as f64;
    let sum = |of: &dyn Fn(&[f64; 2]) -> f64| counts.values().map(of).sum::<f64>();
    let both = hits * n - sum(&|[right, chosen]| right * chosen);
    let right = n * n - sum(&|[right, _]| right * right);
    let chosen = n * n - sum(&|[_, chosen]| chosen * chosen);
    Ok(match right * chosen {
        0.0 => 0.0,
        product => both / product.sqrt(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(how: Aggregation, values: &[RowValue], expected: f64) {
        let values: Vec<&RowValue> = values.iter().collect();
        let found = aggregate(how, &values).unwrap();
        assert!(
            (found - expected).abs() < 1e-12,
            "{how:?}: {found}, not {expected}"
        );
    }

    // F1 and the correlation coefficient: scikit-learn's.
    #[test]
    fn numbers_are_those_worked_out_elsewhere() {
        let numbers = [-1.0, -2.0, -4.5].map(RowValue::Number);
        close(Aggregation::Mean, &numbers, -2.5);
        close(Aggregation::Perplexity, &numbers, 2.5f64.exp());
        let weighted = [(-10.0, 4.0), (-6.0, 1.0)].map(|(sum, n)| RowValue::Weighted(sum, n));
        close(Aggregation::WeightedPerplexity, &weighted, 3.2f64.exp());
        close(Aggregation::BitsPerByte, &weighted, 3.2 / 2f64.ln());
        let labels = |all: &[(i64, i64)]| -> Vec<RowValue> {
            all.iter()
                .map(|(right, chosen)| RowValue::Labels(*right, *chosen))
                .collect()
        };
        let binary = labels(&[(1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (0, 0), (0, 1)]);
        close(Aggregation::F1, &binary, 0.571_428_571_428_571_4);
        close(Aggregation::Mcc, &binary, 0.166_666_666_666_666_66);
        close(Aggregation::F1, &labels(&[(0, 0), (0, 0)]), 0.0);
        close(Aggregation::Mcc, &labels(&[(0, 0), (0, 0)]), 0.0);
        let three = labels(&[(0, 0), (1, 2), (2, 2), (2, 1), (1, 1), (0, 2)]);
        close(Aggregation::Mcc, &three, 0.261_116_483_933_547_1);
    }

    #[test]
    fn values_of_another_kind_are_refused() {
        let label = RowValue::Labels(2, 0);
        let problem = aggregate(Aggregation::Mean, &[&label])
            .unwrap_err()
            .to_string();
        assert_eq!(
            problem,
            "expected numbers for this aggregation, found labels"
        );
        let problem = aggregate(Aggregation::F1, &[&label])
            .unwrap_err()
            .to_string();
        assert_eq!(
            problem,
            "expected labels 0 and 1 for this aggregation, found others"
        );
    }
}
