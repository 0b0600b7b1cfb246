//! The validation pass: the loss on rows that are not trained on, and how far the routing is from the base's.

use burn::module::Module;
use data::{Batch, Sample, collate};
use model::{Model, Observe, Pass, lora};

use super::experts::{self, Picks};
use super::{Event, Host, losses};
use crate::Result;
use crate::metrics::journal::{Journal, Validation};
use crate::session::Session;

/// The batches whose picks are compared with the base's. Those of the base are kept, two bytes each.
const DRIFT_BATCHES: usize = 16;

impl Session {
    /// Measures the validation split, if there is one. Returns whether its loss is the lowest so far.
    pub(super) fn validate(
        &mut self,
        step: u64,
        journal: &mut Journal,
        host: &mut dyn Host,
    ) -> Result<bool> {
        let Some(found) = self.validation() else {
            return Ok(false);
        };
        journal.validation(step, &found)?;
        let drifts = found.routing_drift.iter().map(|layer| layer.drift);
        let n_layers = found.routing_drift.len();
        host.see(&Event::Validated {
            step,
            loss: found.valid_loss,
            drift: (n_layers > 0).then(|| drifts.sum::<f64>() / n_layers as f64),
        });
        Ok(self.state.note_validation(found.valid_loss))
    }

    fn validation(&mut self) -> Option<Validation> {
        let (model, device) = (self.model.clone().valid(), self.device.clone().inner());
        let max_batches = self.recipe.eval.max_batches;
        let limit = max_batches.map_or(usize::MAX, |max| max as usize);
        let (mut sum, mut tokens, mut picks) = (0.0, 0, Vec::new());
        for (i, batch) in self.valid_batches()?.take(limit).enumerate() {
            let mut pass = Pass::new(self.compute());
            if i < DRIFT_BATCHES && !self.adapted.is_empty() {
                pass.observe = Observe::Routing;
            }
            let losses = losses(&model, &batch, &mut pass, &device);
            sum += f64::from(losses.sum().into_scalar::<f32>());
            tokens += batch.trained_tokens;
            picks.extend(picks_of(&pass, &batch));
        }
        let base_picks = self.base_picks.take();
        let base_picks = base_picks.unwrap_or_else(|| {
            let n_batches = limit.min(DRIFT_BATCHES);
            if picks.is_empty() {
                vec![]
            } else {
                self.picks_without_adapter(model, n_batches)
            }
        });
        let routing_drift = experts::drift(&picks, &base_picks);
        self.base_picks = Some(base_picks);
        Some(Validation {
            valid_loss: sum / tokens.max(1) as f64,
            routing_drift,
        })
    }

    /// What the base's routers pick in the first validation batches.
    fn picks_without_adapter(&self, mut model: Model, n_batches: usize) -> Vec<Picks> {
        lora::detach(&mut model);
        let device = self.device.clone().inner();
        let batches = self.valid_batches().into_iter().flatten().take(n_batches);
        let picks = batches.flat_map(|batch| {
            let mut pass = Pass {
                observe: Observe::Routing,
                ..Pass::new(self.compute())
            };
            model.hidden(super::ids(&batch.input_ids, &batch, &device), &mut pass);
            picks_of(&pass, &batch)
        });
        picks.collect()
    }

    /// The validation split in batches, if there is one.
    fn valid_batches(&self) -> Option<impl Iterator<Item = Batch>> {
        let samples = &self.valid.as_ref()?.samples;
        let batches = samples.chunks(self.recipe.eval.batch_size);
        Some(
            batches.map(|samples: &[Sample]| {
                collate(&samples.iter().collect::<Vec<_>>(), self.pad_id)
            }),
        )
    }
}

fn picks_of(pass: &Pass<'_>, batch: &Batch) -> Vec<Picks> {
    let records = pass.routing.iter();
    records
        .map(|record| Picks::of(record, &batch.lengths, batch.cols))
        .collect()
}
