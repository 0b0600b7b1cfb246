//! A learning-rate range test: the loss while the learning rate grows from step to step by the same factor.
//!
//! Too small a rate teaches nothing, too large a rate blows the loss up, and the loss falls fastest between them. The test
//! is a short training run that is not kept.
//!
//! Source: L. N. Smith, arXiv:1506.01186, section 3.3; the steepest descent of the smoothed loss as the suggestion is
//! fast.ai's.

use crate::events::{Event, Host};
use crate::session::Session;
use crate::{Error, Result};

/// The range of learning rates, and the number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RangeTest {
    /// The first learning rate.
    pub from: f64,
    /// The last learning rate.
    pub to: f64,
    /// Number of steps.
    pub steps: u64,
}

/// One step of the test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RatePoint {
    /// The learning rate.
    pub rate: f64,
    /// Mean nats per trained token, or per pair, before the update.
    pub loss: f64,
    /// The same, averaged over the last few steps.
    pub smoothed: f64,
}

/// A loss above the lowest by this factor has blown up.
const BLOWN_UP: f64 = 4.0;

impl RangeTest {
    /// The rate of a step, from 0.
    pub fn rate(&self, step: u64) -> f64 {
        let part = step as f64 / self.steps.saturating_sub(1).max(1) as f64;
        self.from * (self.to / self.from).powf(part)
    }
}

impl Session {
    /// Trains with growing rates until the loss blows up. The session cannot train a run
    /// afterwards.
    ///
    /// # Errors
    /// If the first loss or gradient is already not finite.
    pub fn range_test(&mut self, test: RangeTest, host: &mut dyn Host) -> Result<Vec<RatePoint>> {
        let mut points: Vec<RatePoint> = Vec::new();
        let (mut lowest, calm) = (f64::INFINITY, self.recipe.train.loss.calm());
        let (mut average, mut weights) = (0.0, 0.0);
        for step in 0..test.steps {
            let rate = test.rate(step);
            let report = match self.step(rate, None, host) {
                Err(Error::NotFinite { .. }) if !points.is_empty() => break,
                report => report?,
            };
            // An exponential average over about a twentieth of the steps, unbiased at the start.
            let decay = 1.0 - (20.0 / test.steps as f64).clamp(0.05, 1.0);
            average = decay * average + (1.0 - decay) * report.loss;
            weights = decay * weights + (1.0 - decay);
            let (loss, smoothed) = (report.loss, average / weights);
            points.push(RatePoint {
                rate,
                loss,
                smoothed,
            });
            host.see(&Event::Step(report));
            lowest = lowest.min(smoothed);
            if smoothed > BLOWN_UP * lowest.max(calm) || host.interrupted().is_some() {
                break;
            }
        }
        Ok(points)
    }
}

/// The rate at which the smoothed loss falls fastest over the logarithm of the rate; none if it never falls.
pub fn steepest(points: &[RatePoint]) -> Option<f64> {
    let slopes = points.windows(3).map(|p| {
        let slope = (p[2].smoothed - p[0].smoothed) / (p[2].rate / p[0].rate).ln();
        (slope, p[1].rate)
    });
    let (slope, rate) = slopes.min_by(|a, b| a.0.total_cmp(&b.0))?;
    (slope < 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_grow_by_the_same_factor() {
        let test = RangeTest {
            from: 1e-4,
            to: 1.0,
            steps: 5,
        };
        for (step, expected) in (0..).zip([1e-4, 1e-3, 1e-2, 1e-1, 1.0]) {
            assert!((test.rate(step) / expected - 1.0).abs() < 1e-12);
        }
        assert_eq!(RangeTest { steps: 1, ..test }.rate(0), 1e-4);
    }

    #[test]
    fn the_suggestion_is_where_the_loss_falls_fastest() {
        let points = |losses: &[f64]| -> Vec<RatePoint> {
            let point = |(i, loss): (i32, &f64)| RatePoint {
                rate: 10f64.powi(i),
                loss: *loss,
                smoothed: *loss,
            };
            (0..).zip(losses).map(point).collect()
        };
        assert_eq!(
            steepest(&points(&[5.0, 4.9, 4.0, 2.0, 1.9, 9.0])),
            Some(1e2)
        );
        assert_eq!(steepest(&points(&[1.0, 2.0, 3.0])), None);
        assert_eq!(steepest(&points(&[1.0])), None);
    }
}
