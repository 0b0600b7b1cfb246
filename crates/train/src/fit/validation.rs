//! The validation pass: the loss on rows that are not trained on, and the drift of the routing from the reference's.

use std::time::Instant;

use burn::module::Module;
use data::{Batch, Corpus, collate};
use model::{ForwardContext, Model, Recorder};

use super::forward::{hidden, losses};
use super::reads::Reads;
use super::step::{MicroSums, StepSums};
use crate::Result;
use crate::dpo::Rewards;
use crate::events::{Event, Host, ValidationProgress};
use crate::metrics::journal::{Journal, Validation};
use crate::routing::{self, BatchChoices};
use crate::run_dir::RunDir;
use crate::session::Session;

/// The number of batches in which routing is compared with the reference's. Its choices stay in memory, two bytes each.
const DRIFT_BATCHES: usize = 16;

impl Session {
    /// Measures the validation split after the current step. Returns whether its loss is the lowest so far.
    ///
    /// # Errors
    /// If the host asks to stop, or memory runs short, before all batches are measured: the step is saved, and the run goes
    /// on with the whole pass.
    pub(super) fn validate(
        &mut self,
        run: &RunDir,
        journal: &mut Journal,
        host: &mut dyn Host,
    ) -> Result<bool> {
        let (step, found) = (self.state.step, self.validation(run, host)?);
        self.state.validation_due = false;
        journal.validation(step, &found)?;
        let drifts = found.routing_drift.iter().map(|layer| layer.drift);
        let n_layers = found.routing_drift.len();
        host.see(&Event::Validated {
            step,
            loss: found.valid_loss,
            rewards: found.rewards,
            drift: (n_layers > 0).then(|| drifts.sum::<f64>() / n_layers as f64),
        });
        Ok(self.state.note_validation(found.valid_loss))
    }

    fn validation(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<Validation> {
        let mut pass = self.validation_pass();
        let (model, device) = (self.model.clone().valid(), self.device());
        let (mut own, mut counted, mut choices) = (Vec::new(), 0, Vec::new());
        for (i, batch) in self.valid_batches().enumerate() {
            let batch = batch?;
            counted += self.counted(&batch);
            if !self.takes(i, run, host)? {
                pass.note(&batch, host);
                continue;
            }
            let mut recorder = Recorder::of_routing();
            let mut ctx = ForwardContext::new(self.compute());
            if i < DRIFT_BATCHES && self.reference.is_some() {
                ctx.recorder = Some(&mut recorder);
            }
            let losses = losses(&model, &batch, &mut ctx, &device);
            let (losses, batch_rewards) = self.compared(losses, &batch);
            let mut reads = Reads::default();
            let batch_rewards = batch_rewards.map(|rewards| reads.push(rewards));
            let (loss, chosen) = (
                reads.push(kernels::total(losses)),
                reads.push_choices(&recorder),
            );
            let values = reads.read();
            choices.extend(
                chosen
                    .into_iter()
                    .map(|chosen| values.choices(chosen, &batch)),
            );
            let sums = MicroSums {
                loss: values.scalar(loss),
                rewards: batch_rewards.map(|read| Rewards::sum(values.of(read))),
                ..MicroSums::default()
            };
            own.push(sums.message());
            pass.note(&batch, host);
        }
        self.serve_last_round(self.n_valid_batches(), [Some(&model), self.compared_with()]);
        if self.model.config.moe.is_some() && self.lacks_reference_choices() {
            let found = self.reference_choices(&mut pass, run, host)?;
            if let Some(reference) = &mut self.reference {
                reference.choices = Some(found);
            }
        }
        let reference = self.reference.as_ref();
        let reference_choices = reference.and_then(|reference| reference.choices.as_deref());
        let own_drift = routing::drift_counts(&choices, reference_choices.unwrap_or_default());
        let routing_drift = routing::drift(self.ranks.counts(own_drift)?);
        let mut sums = StepSums::default();
        for message in self.ranks.in_order(own, self.n_valid_batches())? {
            sums.add(MicroSums::read(&message)?);
        }
        Ok(Validation {
            valid_loss: sums.loss / counted.max(1) as f64,
            rewards: sums.rewards.map(|rewards| rewards.mean(counted)),
            routing_drift,
        })
    }

    /// Whether this rank measures the i-th batch. Every rank has one of each round, before which the run may be stopped.
    fn takes(&self, i: usize, run: &RunDir, host: &mut dyn Host) -> Result<bool> {
        let world = &self.ranks.world;
        if i.is_multiple_of(world.ranks()) {
            self.stop_if_asked(run, host)?;
        }
        Ok(i % world.ranks() == world.rank())
    }

    /// Serves the others' forward passes of models in the last round of some batches, if this rank has no batch there.
    fn serve_last_round<'a>(
        &self,
        n_batches: usize,
        models: impl IntoIterator<Item = Option<&'a Model>>,
    ) {
        let world = &self.ranks.world;
        let last = n_batches % world.ranks();
        if self.ranks.shards_experts() && last > 0 && world.rank() >= last {
            let ctx = ForwardContext::new(self.compute());
            let models = models.into_iter().flatten();
            models.for_each(|model| model.serve_experts(&ctx));
        }
    }

    /// The progress of a pass that begins.
    fn validation_pass(&self) -> Pass {
        let batches = self.n_valid_batches();
        let of_reference = if self.lacks_reference_choices() && self.model.config.moe.is_some() {
            batches.min(DRIFT_BATCHES)
        } else {
            0
        };
        Pass {
            started: Instant::now(),
            progress: ValidationProgress {
                batches: 0,
                total: (batches + of_reference) as u64,
                tokens: 0,
                seconds: 0.0,
            },
        }
    }

    fn lacks_reference_choices(&self) -> bool {
        let reference = self.reference.as_ref();
        reference.is_some_and(|reference| reference.choices.is_none())
    }

    /// The choices of the reference's routers in the first validation batches.
    fn reference_choices(
        &self,
        pass: &mut Pass,
        run: &RunDir,
        host: &mut dyn Host,
    ) -> Result<Vec<BatchChoices>> {
        let Some(reference) = &self.reference else {
            return Ok(Vec::new());
        };
        let device = self.device();
        let mut choices = Vec::new();
        for (i, batch) in self.valid_batches().take(DRIFT_BATCHES).enumerate() {
            let batch = batch?;
            if !self.takes(i, run, host)? {
                pass.note(&batch, host);
                continue;
            }
            let mut recorder = Recorder::of_routing();
            let mut ctx = ForwardContext::recorded(self.compute(), &mut recorder);
            hidden(&reference.model, &batch, &mut ctx, &device);
            let mut reads = Reads::default();
            let chosen = reads.push_choices(&recorder);
            let values = reads.read();
            choices.extend(
                chosen
                    .into_iter()
                    .map(|chosen| values.choices(chosen, &batch)),
            );
            pass.note(&batch, host);
        }
        let n_batches = self.n_valid_batches().min(DRIFT_BATCHES);
        self.serve_last_round(n_batches, [Some(&reference.model)]);
        Ok(choices)
    }

    /// Samples in a validation batch. Both answers of a pair are samples, one after another.
    fn valid_batch_size(&self) -> usize {
        let per_row = if self.learns_preferences() { 2 } else { 1 };
        self.recipe.eval.batch_size.saturating_mul(per_row)
    }

    fn max_valid_batches(&self) -> usize {
        let limit = self.recipe.eval.max_batches;
        limit.map_or(usize::MAX, |limit| limit as usize)
    }

    /// The number of [`Session::valid_batches`].
    fn n_valid_batches(&self) -> usize {
        let samples = self.valid.as_ref().map_or(0, Corpus::len);
        let batches = samples.div_ceil(self.valid_batch_size());
        batches.min(self.max_valid_batches())
    }

    /// The batches of the validation split to measure; none if there is no split.
    fn valid_batches(&self) -> impl Iterator<Item = Result<Batch>> {
        let size = self.valid_batch_size();
        let batches = self.valid.iter().flat_map(move |corpus| {
            let firsts = (0..corpus.len()).step_by(size);
            firsts.map(move |first| (corpus, first..corpus.len().min(first + size)))
        });
        batches
            .take(self.max_valid_batches())
            .map(|(corpus, indices)| {
                let samples = indices.map(|index| corpus.sample(index));
                let samples = samples.collect::<data::Result<Vec<_>>>()?;
                Ok(collate(&samples.iter().collect::<Vec<_>>(), self.pad_id))
            })
    }
}

/// A validation pass under way.
struct Pass {
    started: Instant,
    progress: ValidationProgress,
}

impl Pass {
    /// Counts a batch, and tells the host.
    fn note(&mut self, batch: &Batch, host: &mut dyn Host) {
        self.progress.batches += 1;
        self.progress.tokens += batch.lengths.iter().sum::<usize>() as u64;
        self.progress.seconds = self.started.elapsed().as_secs_f64();
        host.see(&Event::Validating(self.progress));
    }
}
