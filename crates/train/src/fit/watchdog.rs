//! Loss spikes: seen, rolled back from, and the batches they came with left out.
//!
//! A spike is a loss far over the average of those before it. Several in a row mean that the run has gone astray: it
//! goes back to the last regular checkpoint before the first of them, and when it comes to their batches again it passes
//! them over. That is bounded, and everything that decides is part of the state, so that a resumed run decides alike.
//!
//! Source: going back and skipping batches is PaLM's remedy, arXiv:2204.02311, section 5.1.

use serde::{Deserialize, Serialize};

use super::Event;
use crate::checkpoint_state::exact;
use crate::events::Host;
use crate::metrics::journal::Journal;
use crate::recipe::TrainSection;
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::{Error, Result};

/// Weight of a new loss in the average: it spans about 20 steps, and as many have to be seen before any is judged.
const WEIGHT: f64 = 0.05;
const WARMUP_STEPS: u64 = 20;

/// What the watchdog remembers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watchdog {
    /// Exponential average of the losses that were no spikes, in nats.
    #[serde(with = "exact")]
    smoothed: f64,
    /// How many losses are in it.
    steps: u64,
    /// Spikes in a row, up to the last step.
    spikes: u64,
    /// The micro-batch with which they began.
    first_batch: u64,
    /// Micro-batches that are passed over, as half-open ranges: one for each time the run went back.
    skipped: Vec<[u64; 2]>,
}

impl Watchdog {
    /// Takes note of a step's loss, whose first micro-batch is given. Returns whether the run has gone astray.
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

    /// The micro-batch that is trained on when this one is next.
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
    /// The regular checkpoint that the run would go back to, after its current step: the last one before the spikes. None
    /// if nobody watches.
    pub(super) fn anchor(&self) -> Option<u64> {
        let train = &self.recipe.train;
        let every = train.save_every.filter(|_| train.spike_factor > 0.0)?;
        let calm_steps = self.state.step.saturating_sub(self.state.watchdog.spikes);
        Some(calm_steps / every * every)
    }

    /// Looks at the loss of the step just made. Returns whether the run went back.
    pub(super) fn roll_back_if_astray(
        &mut self,
        (loss, first_batch): (f64, u64),
        (run, journal): (&RunDir, &mut Journal),
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
        // What came after belongs to the spike; a run that is killed here goes back again.
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
        *journal = Journal::open(run, Some(anchor))?;
        journal.rollback(anchor + 1, step, [loss, smoothed], &skipped)?;
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
