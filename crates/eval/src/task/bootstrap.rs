//! The standard error of a number that is no mean: the deviation of the same number over drawn items.
//!
//! The draws are the harness's own, from Python's random numbers: a thousand for each seed.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/api/metrics.py, `bootstrap_stderr`.

use data::{Aggregation, PythonRandom};
use rayon::prelude::*;

use super::aggregate::aggregate;
use super::row_values::RowValue;
use crate::error::Result;

/// Draws, and those of one seed.
const DRAWS: u64 = 100_000;
const DRAWS_OF_SEED: u64 = 1000;
/// Draws of translations, all of one seed: the harness has so few because it counts each text anew.
const TRANSLATION_DRAWS: u64 = 100;

/// The standard error of an aggregation; none if it has none.
///
/// # Errors
/// As [`aggregate`].
pub(super) fn standard_error(how: Aggregation, values: &[RowValue]) -> Result<Option<f64>> {
    if values.len() < 2 {
        return Ok(None);
    }
    let deviation = |numbers: &[f64]| {
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
        (squares / (numbers.len() as f64 - 1.0)).sqrt()
    };
    match how {
        Aggregation::Mean => {
            let numbers: Vec<f64> = values
                .iter()
                .filter_map(|value| match value {
                    RowValue::Number(number) => Some(*number),
                    _ => None,
                })
                .collect();
            Ok(Some(deviation(&numbers) / (values.len() as f64).sqrt()))
        }
        Aggregation::WeightedPerplexity | Aggregation::BitsPerByte => Ok(None),
        _ => Ok(Some(deviation(&drawn(how, values)?))),
    }
}

/// The seeds, and the draws of each.
fn draws(how: Aggregation) -> (u64, u64) {
    match how {
        Aggregation::Bleu | Aggregation::Chrf | Aggregation::Ter => (1, TRANSLATION_DRAWS),
        _ => (DRAWS / DRAWS_OF_SEED, DRAWS_OF_SEED),
    }
}

/// The number of each draw.
fn drawn(how: Aggregation, values: &[RowValue]) -> Result<Vec<f64>> {
    let (seeds, draws_of_seed) = draws(how);
    let of_seed = |seed: u64| -> Result<Vec<f64>> {
        let mut random = PythonRandom::new(seed);
        let mut drawn: Vec<&RowValue> = Vec::with_capacity(values.len());
        let of_draw = |_| {
            drawn.clear();
            let places = random.choices(values.len(), values.len());
            drawn.extend(places.map(|place| &values[place]));
            aggregate(how, &drawn)
        };
        (0..draws_of_seed).map(of_draw).collect()
    };
    let all: Vec<Vec<f64>> = (0..seeds)
        .into_par_iter()
        .map(of_seed)
        .collect::<Result<_>>()?;
    Ok(all.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    // The harness 0.4.13's own numbers.
    #[test]
    fn errors_are_those_of_the_harness() {
        let numbers: Vec<RowValue> = [1.0, 0.0, 0.0, 1.0, 1.0].map(RowValue::Number).to_vec();
        let found = standard_error(Aggregation::Mean, &numbers)
            .unwrap()
            .unwrap();
        assert!((found - 0.244_948_974_278_317_83).abs() < 1e-15, "{found}");
        let logprobs: Vec<RowValue> = [-1.5, -0.25, -3.0, -2.0].map(RowValue::Number).to_vec();
        let found = standard_error(Aggregation::Perplexity, &logprobs)
            .unwrap()
            .unwrap();
        assert!((found - 3.080_049_447_255_764).abs() < 1e-9, "{found}");
        let labels = [(1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (0, 0)];
        let labels: Vec<RowValue> = labels.map(|(a, b)| RowValue::Labels(a, b)).to_vec();
        let found = standard_error(Aggregation::Mcc, &labels).unwrap().unwrap();
        assert!((found - 0.411_966_193_066_953_4).abs() < 1e-9, "{found}");
        let found = standard_error(Aggregation::F1, &labels).unwrap().unwrap();
        assert!((found - 0.263_628_886_950_548_37).abs() < 1e-9, "{found}");
    }

    #[test]
    fn one_item_and_weighted_means_have_none() {
        let one = [RowValue::Number(1.0)];
        assert_eq!(standard_error(Aggregation::Mean, &one).unwrap(), None);
        let weighted = [RowValue::Weighted(1.0, 2.0), RowValue::Weighted(1.0, 2.0)];
        assert_eq!(
            standard_error(Aggregation::BitsPerByte, &weighted).unwrap(),
            None
        );
    }
}
