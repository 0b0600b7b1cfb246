//! The validation pass: the loss on rows that are not trained on, and how far the routing is from the base's.

use burn::module::Module;
use data::{Batch, collate};
use model::{Model, Observe, Pass, lora};

use super::experts::{self, Picks};
use super::{Event, Host, hidden, losses};
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
        let Some(found) = self.validation()? else {
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

    fn validation(&mut self) -> Result<Option<Validation>> {
        if self.valid.is_none() {
            return Ok(None);
        }
        let (model, device) = (self.model.clone().valid(), self.device.clone().inner());
        let (mut sum, mut tokens, mut picks) = (0.0, 0, Vec::new());
        for (i, batch) in self.valid_batches().enumerate() {
            let batch = batch?;
            let mut pass = Pass::new(self.compute());
            if i < DRIFT_BATCHES && !self.adapted.is_empty() {
                pass.observe = Observe::Routing;
            }
            let losses = losses(&model, &batch, &mut pass, &device);
            sum += f64::from(losses.sum().into_scalar::<f32>());
            tokens += batch.trained_tokens;
            picks.extend(picks_of(&pass, &batch));
        }
        let base_picks = match self.base_picks.take() {
            Some(base_picks) => base_picks,
            None if picks.is_empty() => vec![],
            None => self.picks_without_adapter(model)?,
        };
        let routing_drift = experts::drift(&picks, &base_picks);
        self.base_picks = Some(base_picks);
        Ok(Some(Validation {
            valid_loss: sum / tokens.max(1) as f64,
            routing_drift,
        }))
    }

    /// What the base's routers pick in the first validation batches.
    fn picks_without_adapter(&self, mut model: Model) -> Result<Vec<Picks>> {
        lora::detach(&mut model);
        let device = self.device.clone().inner();
        let mut picks = Vec::new();
        for batch in self.valid_batches().take(DRIFT_BATCHES) {
            let batch = batch?;
            let mut pass = Pass {
                observe: Observe::Routing,
                ..Pass::new(self.compute())
            };
            hidden(&model, &batch, &mut pass, &device);
            picks.extend(picks_of(&pass, &batch));
        }
        Ok(picks)
    }

    /// What is measured of the validation split, in batches; none if there is no split.
    fn valid_batches(&self) -> impl Iterator<Item = Result<Batch>> {
        let eval = &self.recipe.eval;
        let limit = eval.max_batches.map_or(usize::MAX, |max| max as usize);
        let batches = self.valid.iter().flat_map(move |corpus| {
            let firsts = (0..corpus.len()).step_by(eval.batch_size);
            firsts.map(move |first| (corpus, first..corpus.len().min(first + eval.batch_size)))
        });
        batches.take(limit).map(|(corpus, indices)| {
            let samples = indices.map(|index| corpus.sample(index));
            let samples = samples.collect::<data::Result<Vec<_>>>()?;
            Ok(collate(&samples.iter().collect::<Vec<_>>(), self.pad_id))
        })
    }
}

fn picks_of(pass: &Pass<'_>, batch: &Batch) -> Vec<Picks> {
    let records = pass.routing.iter();
    records
        .map(|record| Picks::of(record, &batch.lengths, batch.cols))
        .collect()
}
