//! The validation pass: the loss on rows that are not trained on, and the drift of the routing from the reference's.

use burn::module::Module;
use data::{Batch, collate};
use model::{ForwardContext, Model, Recorder};

use super::forward::{hidden, losses};
use crate::Result;
use crate::dpo::Rewards;
use crate::events::{Event, Host};
use crate::metrics::journal::{Journal, Validation};
use crate::routing::{self, BatchChoices};
use crate::session::Session;

/// The number of batches in which routing is compared with the reference's. Its choices stay in memory, two bytes each.
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
            rewards: found.rewards,
            drift: (n_layers > 0).then(|| drifts.sum::<f64>() / n_layers as f64),
        });
        Ok(self.state.note_validation(found.valid_loss))
    }

    fn validation(&mut self) -> Result<Option<Validation>> {
        if self.valid.is_none() {
            return Ok(None);
        }
        let (model, device) = (self.model.clone().valid(), self.device());
        let (mut sum, mut counted, mut choices) = (0.0, 0, Vec::new());
        let mut rewards = None::<Rewards>;
        for (i, batch) in self.valid_batches().enumerate() {
            let batch = batch?;
            let mut recorder = Recorder::of_routing();
            let mut ctx = ForwardContext::new(self.compute());
            if i < DRIFT_BATCHES && self.reference.is_some() {
                ctx.recorder = Some(&mut recorder);
            }
            let losses = losses(&model, &batch, &mut ctx, &device);
            choices.extend(choices_of(&recorder, &batch));
            let (losses, batch_rewards) = self.compared(losses, &batch);
            sum += f64::from(losses.sum().into_scalar::<f32>());
            counted += self.counted(&batch);
            if let Some(batch_rewards) = batch_rewards {
                rewards.get_or_insert_default().add(batch_rewards);
            }
        }
        if !choices.is_empty() {
            self.note_reference_choices()?;
        }
        let reference = self.reference.as_ref();
        let reference_choices = reference.and_then(|reference| reference.choices.as_deref());
        let routing_drift = routing::drift(&choices, reference_choices.unwrap_or_default());
        Ok(Some(Validation {
            valid_loss: sum / counted.max(1) as f64,
            rewards: rewards.map(|rewards| rewards.mean(counted)),
            routing_drift,
        }))
    }

    /// Computes the reference's choices in the first validation pass.
    fn note_reference_choices(&mut self) -> Result<()> {
        let choices = match &self.reference {
            Some(reference) if reference.choices.is_none() => self.choices(&reference.model)?,
            _ => return Ok(()),
        };
        if let Some(reference) = &mut self.reference {
            reference.choices = Some(choices);
        }
        Ok(())
    }

    /// The choices of a model's routers in the first validation batches.
    fn choices(&self, model: &Model) -> Result<Vec<BatchChoices>> {
        let device = self.device();
        let mut choices = Vec::new();
        for batch in self.valid_batches().take(DRIFT_BATCHES) {
            let batch = batch?;
            let mut recorder = Recorder::of_routing();
            let mut ctx = ForwardContext::recorded(self.compute(), &mut recorder);
            hidden(model, &batch, &mut ctx, &device);
            choices.extend(choices_of(&recorder, &batch));
        }
        Ok(choices)
    }

    /// The batches of the validation split to measure; none if there is no split.
    fn valid_batches(&self) -> impl Iterator<Item = Result<Batch>> {
        let eval = &self.recipe.eval;
        let limit = eval.max_batches.map_or(usize::MAX, |max| max as usize);
        // Both answers of a pair are samples, one after another.
        let per_row = if self.learns_preferences() { 2 } else { 1 };
        let size = eval.batch_size * per_row;
        let batches = self.valid.iter().flat_map(move |corpus| {
            let firsts = (0..corpus.len()).step_by(size);
            firsts.map(move |first| (corpus, first..corpus.len().min(first + size)))
        });
        batches.take(limit).map(|(corpus, indices)| {
            let samples = indices.map(|index| corpus.sample(index));
            let samples = samples.collect::<data::Result<Vec<_>>>()?;
            Ok(collate(&samples.iter().collect::<Vec<_>>(), self.pad_id))
        })
    }
}

fn choices_of(recorder: &Recorder, batch: &Batch) -> Vec<BatchChoices> {
    let records = recorder.routing.iter();
    records
        .map(|record| BatchChoices::of(record, &batch.lengths, batch.cols))
        .collect()
}
