//! The learning rate of every step.

use std::f64::consts::PI;

use crate::recipe::{ScheduleKind, ScheduleSection};

/// The learning rate over a run: a linear warmup to the peak, then a decay.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    section: ScheduleSection,
}

impl Schedule {
    /// A schedule with this peak, the recipe's `optimizer.learning_rate`.
    pub fn new(peak: f64, section: &ScheduleSection) -> Self {
        Self {
            peak,
            section: section.clone(),
        }
    }

    /// The learning rate of update number `step`, counted from 0, in a run of `total` updates.
    ///
    /// With `w` warmup steps, step 0 has `peak / w` and step `w - 1` the peak; without warmup,
    /// step 0 has the peak. From there the decay ends in the last step, which has
    /// `final_ratio · peak`, as have steps beyond it.
    pub fn rate(&self, step: u64, total: u64) -> f64 {
        let warmup_steps = self.section.warmup_steps;
        if step < warmup_steps {
            return self.peak * ((step + 1) as f64 / warmup_steps as f64);
        }
        let first = warmup_steps.saturating_sub(1); // the step with the peak
        let last = total.saturating_sub(1);
        let n_decay_steps = last.saturating_sub(first);
        let progress = if n_decay_steps == 0 {
            // A run that ends with its warmup, or a step beyond its end.
            if step > first { 1.0 } else { 0.0 }
        } else {
            ((step - first) as f64 / n_decay_steps as f64).min(1.0)
        };

        let remaining = match self.section.kind {
            ScheduleKind::Constant => return self.peak,
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        };
        let final_ratio = self.section.final_ratio;
        self.peak * (final_ratio + (1.0 - final_ratio) * remaining)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rates are of a few operations in f64.
    const ROUNDING: f64 = 1e-15;
    /// The tables below have up to one step more.
    const TOTAL: u64 = 5;

    fn check(kind: ScheduleKind, warmup_steps: u64, final_ratio: f64, expected: &[f64]) {
        let section = ScheduleSection {
            kind,
            warmup_steps,
            final_ratio,
        };
        let schedule = Schedule::new(2.0, &section);
        for (step, expected) in expected.iter().enumerate() {
            let found = schedule.rate(step as u64, TOTAL);
            assert!(
                (found - expected).abs() <= ROUNDING,
                "{kind:?}, {warmup_steps} warmup steps, step {step}: expected {expected}, found {found}"
            );
        }
    }

    #[test]
    fn the_rate_rises_to_the_peak_and_falls_to_the_final_ratio_in_the_last_step() {
        use ScheduleKind::{Constant, Cosine, Linear};
        let half = 0.5f64.sqrt() * 0.5; // cos 45° / 2
        check(Constant, 0, 0.1, &[2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        check(Constant, 4, 0.1, &[0.5, 1.0, 1.5, 2.0, 2.0]);
        check(Linear, 0, 0.0, &[2.0, 1.5, 1.0, 0.5, 0.0, 0.0]);
        check(Linear, 0, 0.5, &[2.0, 1.75, 1.5, 1.25, 1.0, 1.0]);
        check(Linear, 1, 0.0, &[2.0, 1.5, 1.0, 0.5, 0.0]);
        check(Linear, 3, 0.0, &[2.0 / 3.0, 4.0 / 3.0, 2.0, 1.0, 0.0]);
        check(
            Cosine,
            0,
            0.0,
            &[2.0, 1.0 + 2.0 * half, 1.0, 1.0 - 2.0 * half, 0.0],
        );
        check(Cosine, 3, 0.1, &[2.0 / 3.0, 4.0 / 3.0, 2.0, 1.1, 0.2, 0.2]);
        check(Cosine, 5, 0.1, &[0.4, 0.8, 1.2, 1.6, 2.0, 0.2]);
        check(Cosine, 10, 0.1, &[0.2, 0.4, 0.6, 0.8, 1.0]);
    }

    #[test]
    fn a_run_of_one_step_is_at_the_peak() {
        let schedule = Schedule::new(2.0, &ScheduleSection::default());
        assert_eq!(schedule.rate(0, 1), 2.0);
        assert_eq!(schedule.rate(0, 0), 2.0);
    }
}
