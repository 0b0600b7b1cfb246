//! Differences of two models' numbers on the same items.
//!
//! An item that is hard for one model is hard for another, so the difference of two numbers is known better than either: it is
//! computed from the same items for both.
//!
//! Source: arXiv:2411.00640 (paired differences).

use data::Aggregation;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::interval::{Interval, holm, mcnemar, of_draws, of_share, of_shares};
use crate::perplexity::TextScore;
use crate::task::{GroupMean, MetricResult, RowValue, aggregate};

/// The difference of a model's number to another model's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The model's number minus the other's.
    pub difference: f64,
    /// What the true difference lies in, 95 times of 100.
    pub interval: Interval,
    /// How probable such a difference is if there is none.
    pub p: f64,
    /// The same among all comparisons of a report: the chance that any is so small by accident.
    pub p_holm: f64,
    /// The smallest difference that this number of items can show.
    pub shows_from: f64,
    /// What it says of the model.
    pub verdict: Verdict,
}

/// What a difference says of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is better.
    Better,
    /// It is worse.
    Worse,
    /// The difference may be chance.
    Open,
}

/// The probability below which a difference is none by chance.
const BY_CHANCE: f64 = 0.05;

/// A number of a model, and the items that it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasuredNumber {
    number: ItemNumber,
    items: Vec<RowValue>,
    is_higher_better: bool,
}

/// How items become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ItemNumber {
    Metric(Aggregation),
    /// The mean by weights.
    WeightedMean,
}

impl From<&MetricResult> for MeasuredNumber {
    fn from(metric: &MetricResult) -> Self {
        Self {
            number: ItemNumber::Metric(metric.aggregation),
            items: metric.of_items.clone(),
            is_higher_better: metric.is_higher_better,
        }
    }
}

impl From<&TextScore> for MeasuredNumber {
    /// The loss, in nats per token.
    fn from(text: &TextScore) -> Self {
        let item = |loss: &crate::losses::SampleLoss| {
            RowValue::Weighted(loss.loss_sum, loss.tokens as f64)
        };
        Self {
            number: ItemNumber::WeightedMean,
            items: text.per_sample.iter().map(item).collect(),
            is_higher_better: false,
        }
    }
}

impl MeasuredNumber {
    /// The mean of a group over the items of all its tasks; none if it is no such mean.
    pub(crate) fn of_group(mean: &GroupMean) -> Option<Self> {
        Some(Self {
            number: ItemNumber::Metric(Aggregation::Mean),
            items: mean.of_items.clone()?,
            is_higher_better: mean.is_higher_better,
        })
    }

    /// Whether every item is right or wrong.
    fn is_right_or_wrong(&self) -> bool {
        let is_binary = |item: &RowValue| matches!(item, RowValue::Number(number) if *number == 0.0 || *number == 1.0);
        self.number == ItemNumber::Metric(Aggregation::Mean) && self.items.iter().all(is_binary)
    }

    /// Which items are right.
    fn right(&self) -> impl Iterator<Item = bool> {
        self.items.iter().map(|item| *item == RowValue::Number(1.0))
    }

    /// The number of some items.
    fn of(&self, places: impl Iterator<Item = usize>) -> f64 {
        let items = places.map(|place| &self.items[place]);
        match self.number {
            ItemNumber::Metric(how) => {
                let items: Vec<&RowValue> = items.collect();
                aggregate(how, &items).unwrap_or(f64::NAN)
            }
            ItemNumber::WeightedMean => {
                let (sum, weights) = items.fold((0.0, 0.0), |(sum, weights), item| match item {
                    RowValue::Weighted(value, weight) => (sum + value, weights + weight),
                    _ => (f64::NAN, weights),
                });
                sum / weights
            }
        }
    }

    /// The number of all items.
    pub(crate) fn value(&self) -> f64 {
        self.of(0..self.items.len())
    }

    /// The interval of the number alone.
    pub(crate) fn interval(&self) -> Interval {
        if self.is_right_or_wrong() {
            return of_share(
                self.right().filter(|right| *right).count(),
                self.items.len(),
            );
        }
        of_draws(self.items.len(), |places| self.of(places.iter().copied())).0
    }

    /// The interval of this number minus `factor` times another one of the same items.
    pub(crate) fn interval_beyond(&self, other: &Self, factor: f64) -> Result<Interval> {
        if factor == 1.0 {
            return Ok(self.beyond(other)?.0);
        }
        self.expect_paired(other)?;
        let beyond = |places: &[usize]| {
            let places = || places.iter().copied();
            self.of(places()) - factor * other.of(places())
        };
        Ok(of_draws(self.items.len(), beyond).0)
    }

    /// The interval of the difference, and how probable it is without one.
    fn beyond(&self, other: &Self) -> Result<(Interval, f64)> {
        self.expect_paired(other)?;
        if self.is_right_or_wrong() && other.is_right_or_wrong() {
            let pairs = || self.right().zip(other.right());
            let gained = pairs().filter(|pair| *pair == (true, false)).count();
            let lost = pairs().filter(|pair| *pair == (false, true)).count();
            let interval = of_shares(gained, lost, self.items.len());
            return Ok((interval, mcnemar(gained, lost)));
        }
        let difference = |places: &[usize]| {
            let places = || places.iter().copied();
            self.of(places()) - other.of(places())
        };
        Ok(of_draws(self.items.len(), difference))
    }

    fn expect_paired(&self, other: &Self) -> Result<()> {
        expect_equal("number of items", other.items.len(), self.items.len())?;
        for (first, second) in other.items.iter().zip(&self.items) {
            if let (RowValue::Weighted(_, first), RowValue::Weighted(_, second)) = (first, second) {
                expect_equal("targets in every sample", *first as usize, *second as usize)?;
            }
        }
        Ok(())
    }

    /// The difference to another model's number, among so far one comparison.
    ///
    /// # Errors
    /// [`Error::NotPaired`] if the two were not measured on the same items, as with texts and different tokenizers.
    pub fn difference(&self, other: &Self) -> Result<Difference> {
        let (interval, p) = self.beyond(other)?;
        let mut found = Difference {
            difference: self.value() - other.value(),
            interval,
            p,
            p_holm: p,
            shows_from: (interval[1] - interval[0]) / 2.0,
            verdict: Verdict::Open,
        };
        found.judge(p, self.is_higher_better);
        Ok(found)
    }
}

impl Difference {
    fn judge(&mut self, p_holm: f64, is_higher_better: bool) {
        self.p_holm = p_holm;
        let is_better = (self.difference > 0.0) == is_higher_better;
        self.verdict = match p_holm < BY_CHANCE {
            true if is_better => Verdict::Better,
            true => Verdict::Worse,
            false => Verdict::Open,
        };
    }
}

/// Judges differences together, each with whether more is better.
pub(crate) fn judge_all(differences: &mut [(&mut Difference, bool)]) {
    let p: Vec<f64> = differences
        .iter()
        .map(|(difference, _)| difference.p)
        .collect();
    for ((difference, is_higher_better), p) in differences.iter_mut().zip(holm(&p)) {
        difference.judge(p, *is_higher_better);
    }
}

fn expect_equal(items: &'static str, first: usize, second: usize) -> Result<()> {
    if first == second {
        return Ok(());
    }
    Err(Error::NotPaired {
        items,
        first,
        second,
    })
}

#[cfg(test)]
mod tests {
    use data::{Metric, MetricUse};

    use super::*;
    use crate::losses::SampleLoss;

    fn text(samples: &[(f64, usize)]) -> MeasuredNumber {
        let loss = |(loss_sum, tokens): &(f64, usize)| SampleLoss {
            loss_sum: *loss_sum,
            tokens: *tokens,
        };
        MeasuredNumber::from(&TextScore::new(samples.iter().map(loss).collect(), None).unwrap())
    }

    fn metric(metric: Metric, numbers: &[f64]) -> MeasuredNumber {
        let values = numbers.iter().map(|number| RowValue::Number(*number));
        let of = MetricUse::usual(metric);
        MeasuredNumber::from(&MetricResult::new("none", &of, values.collect()).unwrap())
    }

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() < tolerance,
            "{found}, not {expected}"
        );
    }

    #[test]
    fn the_difference_of_losses_is_paired_by_sample() {
        // Losses far apart, differences of −1 per token and some noise: 30 samples of 1 to 3 tokens.
        let samples = |shift: f64| -> Vec<(f64, usize)> {
            let sample = |i: usize| {
                let tokens = 1 + i % 3;
                let noise = if shift == 0.0 {
                    0.0
                } else {
                    0.1 * (i % 5) as f64 - 0.2
                };
                (
                    (i * 7 % 11) as f64 + tokens as f64 * (shift + noise),
                    tokens,
                )
            };
            (0..30).map(sample).collect()
        };
        let (first, second) = (text(&samples(0.0)), text(&samples(-1.0)));
        let found = second.difference(&first).unwrap();
        close(found.difference, -1.0, 0.02);
        let [low, high] = found.interval;
        assert!(
            low > -1.1 && low < -1.0 && high < -0.9 && high > -1.0,
            "{found:?}"
        );
        assert_eq!((found.verdict, found.p < 1e-3), (Verdict::Better, true));
        let back = first.difference(&second).unwrap();
        assert_eq!(back.verdict, Verdict::Worse);
    }

    #[test]
    fn the_difference_of_right_answers_is_exact() {
        // Of 12 answers 6 are gained and none is lost.
        let mut numbers = [0.0; 12];
        let first = metric(Metric::Acc, &numbers);
        numbers[..6].fill(1.0);
        let second = metric(Metric::Acc, &numbers);
        let found = second.difference(&first).unwrap();
        close(found.difference, 0.5, 1e-12);
        close(found.p, 0.031_25, 1e-12);
        assert_eq!(found.verdict, Verdict::Better);
        // Two such comparisons are none any more.
        let (mut one, mut two) = (found, found);
        judge_all(&mut [(&mut one, true), (&mut two, true)]);
        close(one.p_holm, 0.062_5, 1e-12);
        assert_eq!(one.verdict, Verdict::Open);
        let same = first.difference(&first).unwrap();
        assert_eq!(
            (same.difference, same.p, same.verdict),
            (0.0, 1.0, Verdict::Open)
        );
        assert!(same.interval[0] < 0.0 && same.interval[1] > 0.0);
    }

    #[test]
    fn other_numbers_are_drawn_again() {
        let numbers: Vec<f64> = (0..40).map(|i| -1.0 - f64::from(i % 4)).collect();
        let better: Vec<f64> = numbers.iter().map(|number| number + 0.5).collect();
        let (first, second) = (
            metric(Metric::Perplexity, &numbers),
            metric(Metric::Perplexity, &better),
        );
        let found = second.difference(&first).unwrap();
        close(found.difference, 2f64.exp() - 2.5f64.exp(), 1e-9);
        assert!(
            found.interval[1] < 0.0 && found.verdict == Verdict::Better,
            "{found:?}"
        );
        // The number is 0.61 times the other one, for all draws.
        let [low, high] = second.interval_beyond(&first, (-0.5f64).exp()).unwrap();
        assert!(low.abs() < 1e-9 && high.abs() < 1e-9);
    }

    #[test]
    fn different_items_are_not_compared() {
        let one = text(&[(1.0, 1), (1.0, 2)]);
        for (other, expected) in [
            (
                text(&[(1.0, 1)]),
                "the same number of items for both models, found 2 and 1",
            ),
            (
                text(&[(1.0, 2), (1.0, 1)]),
                "the same targets in every sample for both models, found 1 and 2",
            ),
        ] {
            let problem = other.difference(&one).unwrap_err().to_string();
            assert_eq!(problem, format!("expected {expected}"));
        }
    }
}
