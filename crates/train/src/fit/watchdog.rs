//! The watchdog: detects loss spikes, rolls the run back, and skips the batches of the spike.
//!
//! A spike is a loss far above the average of those before it. Several in a row mean that the run has gone astray: it goes
//! back to the last regular checkpoint before the first spike, and skips the spikes' batches when it comes to them again.
//! The number of rollbacks is bounded, and everything that decides is part of the state, so that a resumed run decides
//! alike.
//!
//! Source: going back and skipping batches is PaLM's remedy, arXiv:2204.02311, section 5.1.

use crate::checkpoint_state::Watchdog;
use crate::events::{Event, Host};
use crate::metrics::LastLine;
use crate::metrics::journal::Journal;
use crate::recipe::TrainSection;
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::{Error, Result};

/// Weight of a new loss in the average, which spans about 20 steps. No loss is a spike before the average has as many.
const WEIGHT: f64 = 0.05;
const WARMUP_STEPS: u64 = 20;

impl Watchdog {
    /// Adds the loss of a step that began with micro-batch `first_batch`. Returns whether the run has gone astray.
    fn is_astray(&mut self, loss: f64, first_batch: u64, train: &TrainSection) -> bool {
        let is_high = loss > train.spike_factor * self.smoothed && loss > train.loss.calm();
        if self.steps >= WARMUP_STEPS && is_high {
            if self.spikes == 0 {
                self.first_batch = first_batch;
            }
            self.spikes += 1;
            return self.spikes >= train.spike_steps;
        }
        let old = if self.steps == 0 { loss } else { self.smoothed };
        self.smoothed = old + WEIGHT * (loss - old);
        self.steps += 1;
        self.spikes = 0;
        false
    }

    /// The first micro-batch from this one on that is not skipped.
    pub(super) fn next_batch(&self, mut batch: u64) -> u64 {
        // Ranges are in the order in which the run came to them.
        for [start, end] in &self.skipped {
            if (*start..*end).contains(&batch) {
                batch = *end;
            }
        }
        batch
    }
}

impl Session {
    /// Checks the loss of the step just made. Returns whether the run went back.
    pub(super) fn roll_back_if_astray(
        &mut self,
        loss: f64,
        first_batch: u64,
        run: &RunDir,
        journal: &mut Journal,
        host: &mut dyn Host,
    ) -> Result<bool> {
        let train = &self.recipe.train;
        let is_watched = train.spike_factor > 0.0;
        if !is_watched || !self.state.watchdog.is_astray(loss, first_batch, train) {
            return Ok(false);
        }
        let (step, max_rollbacks) = (self.state.step, train.max_rollbacks);
        let Some(anchor) = self.anchor() else {
            return Ok(false);
        };
        let Watchdog {
            smoothed,
            mut skipped,
            ..
        } = self.state.watchdog.clone();
        let rollbacks = skipped.len() as u64;
        // Later checkpoints belong to the spike; a run that is killed here goes back again.
        run.remove_after(anchor)?;
        if rollbacks >= max_rollbacks {
            return Err(Error::Diverged {
                run: run.path().to_owned(),
                step,
                loss,
                smoothed,
                rollbacks,
                anchor,
            });
        }
        skipped.push([self.state.watchdog.first_batch, self.state.micro_step]);
        self.load(&run.checkpoint_path(anchor))?;
        self.state.watchdog.skipped = skipped.clone();
        *journal = self.journal(run, Some(LastLine::of_step(anchor)))?;
        journal.rollback(anchor + 1, step, loss, smoothed, &skipped)?;
        host.see(&Event::RolledBack {
            step,
            loss,
            smoothed,
            to: anchor,
        });
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Loss;

    #[test]
    fn only_several_spikes_in_a_row_count_and_only_after_a_while() {
        let train = TrainSection {
            spike_factor: 2.0,
            spike_steps: 3,
            ..TrainSection::default()
        };
        let mut watchdog = Watchdog::default();
        let mut see = |loss, batch| watchdog.is_astray(loss, batch, &train);
        // The first twenty may be anything.
        for batch in 0..20 {
            assert!(!see(if batch == 7 { 9.0 } else { 1.0 }, batch));
        }
        assert!(!see(5.0, 20) && !see(5.0, 21) && !see(1.0, 22));
        assert!(!see(5.0, 23) && !see(5.0, 24) && see(5.0, 25));
        assert_eq!(watchdog.first_batch, 23);
        // Spikes are not part of the average they are compared with.
        assert!(watchdog.smoothed < 1.5, "{watchdog:?}");
    }

    #[test]
    fn a_pair_that_is_still_told_apart_is_no_spike() {
        let train = TrainSection {
            loss: Loss::Dpo,
            spike_factor: 2.0,
            spike_steps: 1,
            ..TrainSection::default()
        };
        let mut watchdog = Watchdog::default();
        let mut see = |loss, batch| watchdog.is_astray(loss, batch, &train);
        assert!((0..20).all(|batch| !see(0.05, batch)));
        assert!(!see(0.69, 20) && see(0.7, 21));
    }

    #[test]
    fn skipped_batches_are_passed_over_one_range_after_the_other() {
        let watchdog = Watchdog {
            skipped: vec![[4, 6], [6, 8], [20, 22]],
            ..Watchdog::default()
        };
        let next = [3, 4, 5, 7, 8, 20, 22].map(|batch| watchdog.next_batch(batch));
        assert_eq!(next, [3, 8, 8, 8, 8, 22, 22]);
    }
}
