//! The training loop: forward, backward, update; validate, save, log.
//!
//! The loss is averaged over the trained tokens of the whole step: a step of four micro-batches has the gradient of
//! one four times as large, however unevenly the tokens are spread over them.

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use data::{Batch, collate};
use model::{Model, Observe, Parameter, Pass};
use serde::Serialize;

use crate::balance::{self, Valid};
use crate::dataset::segments;
use crate::dpo::{self, Rewards};
use crate::loss_scale::LossScale;
use crate::optimizer::Accumulated;
use crate::run_dir::RunDir;
use crate::schedule::Schedule;
use crate::session::Session;
use crate::state::write_optimizer;
use crate::{Error, Metrics, Result, export};

/// What happened, for whoever watches.
#[derive(Clone, Debug)]
pub enum Event {
    /// An update was made.
    Step(StepReport),
    /// The validation loss was measured.
    Validated {
        /// After which step.
        step: u64,
        /// Mean nats per trained token.
        loss: f64,
    },
    /// Gradients overflowed in f16; the step is taken again with this loss scale.
    Overflowed {
        /// Which step.
        step: u64,
        /// Half of what it was.
        loss_scale: f64,
    },
    /// A checkpoint was written.
    Saved {
        /// After which step.
        step: u64,
    },
}

/// One update.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Its number, from 1.
    #[serde(skip)]
    pub step: u64,
    /// Mean nats per trained token, or per pair, over the step.
    pub loss: f64,
    /// Means over the step's pairs, if preferences are learned.
    #[serde(flatten)]
    pub rewards: Option<Rewards>,
    /// The learning rate.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens of the step, padding left out.
    pub tokens: usize,
    /// Tokens that were targets.
    pub trained_tokens: usize,
    /// Sum over layers of the balance loss, if it is part of the loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_loss: Option<f64>,
    /// What the loss was multiplied by before it was differentiated, in f16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// The most bytes that waited for the backward pass as inputs of linear layers, of SwiGLU and of experts.
    pub kept_bytes: usize,
    /// Wall time of the step.
    pub seconds: f64,
}

impl Session {
    /// Trains to the end of the recipe, writing metrics and checkpoints to `run`, and the result at the end:
    /// `adapter/` or `model/`.
    ///
    /// # Errors
    /// If a loss or gradient is not finite, or writing fails. The latest checkpoint stays.
    pub fn fit(&mut self, run: &RunDir, watch: &mut dyn FnMut(&Event)) -> Result<()> {
        let resumed = (self.state.step > 0).then_some(self.state.step);
        let mut metrics = run.metrics(resumed)?;
        let policy = format!("{}\n", self.policy()?);
        checkpoint::write_file(&run.path().join("precision.txt"), policy.as_bytes())?;
        let (total, train) = (self.total_steps(), self.recipe.train.clone());
        let due =
            |every: Option<u64>, step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        let mut validated = None;
        while self.state.step < total {
            let report = self.step(total, watch)?;
            let step = report.step;
            if step.is_multiple_of(train.log_every) || step == total {
                metrics.append(step, &report)?;
            }
            watch(&Event::Step(report));
            if due(train.eval_every, step) {
                self.validate(step, &mut metrics, watch)?;
                validated = Some(step);
            }
            if due(train.save_every, step) && step < total {
                self.save(run, watch)?;
            }
        }
        // A finished run that is resumed has all this, and may lack its result only.
        if resumed != Some(total) {
            if validated != Some(total) {
                self.validate(total, &mut metrics, watch)?;
            }
            self.save(run, watch)?;
        }
        export::result(self, run)
    }

    /// One update.
    fn step(&mut self, total: u64, watch: &mut dyn FnMut(&Event)) -> Result<StepReport> {
        let started = Instant::now();
        let batches = self.next_batches()?;
        let trained_tokens: usize = batches.iter().map(|batch| batch.trained_tokens).sum();
        let counted: usize = batches.iter().map(|batch| self.counted(batch)).sum();
        let (sums, norm) = self.finite_sums(&batches, counted, watch)?;
        let (step, scale) = (self.state.step + 1, self.loss_scale());
        let rate = Schedule::new(self.recipe.optimizer.learning_rate, &self.recipe.schedule)
            .rate(self.state.step, total);
        let numbers = (step, norm, scale.unwrap_or(1.0));
        self.model = self
            .optimizer
            .step(self.model.clone(), sums.gradients, rate, numbers);
        let train = &self.recipe.train;
        if train.bias_update_speed > 0.0 {
            balance::update_biases(&mut self.model, &sums.loads, train.bias_update_speed);
        }
        let interval = self.recipe.precision.loss_scale_growth_interval;
        let grown = |scale: LossScale| scale.after_clean_step(interval);
        self.state.loss_scale = self.state.loss_scale.map(grown);
        self.state.micro_step += batches.len() as u64;
        self.state.step = step;
        self.state.trained_tokens += trained_tokens as u64;
        Ok(StepReport {
            step,
            loss: sums.loss / counted.max(1) as f64,
            rewards: sums.rewards.map(|rewards| rewards.mean(counted)),
            learning_rate: rate,
            grad_norm: norm,
            tokens: batches.iter().flat_map(|batch| &batch.lengths).sum(),
            trained_tokens,
            balance_loss: (train.balance_loss > 0.0).then_some(sums.balance / batches.len() as f64),
            loss_scale: scale,
            kept_bytes: kernels::kept_bytes(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// The sums of a step and the norm of its gradient, all finite. Where f16 gradients overflow, the same batches are
    /// taken again with half the loss scale.
    fn finite_sums(
        &mut self,
        batches: &[Batch],
        counted: usize,
        watch: &mut dyn FnMut(&Event),
    ) -> Result<(Sums, f64)> {
        loop {
            let scale = self.loss_scale();
            let sums = self.sums(batches, scale.unwrap_or(1.0) / counted.max(1) as f64);
            let norm = sums.gradients.norm() / scale.unwrap_or(1.0);
            if sums.loss.is_finite() && norm.is_finite() {
                return Ok((sums, norm));
            }
            let step = self.state.step + 1;
            let halved = self.state.loss_scale.and_then(LossScale::halved);
            match halved {
                Some(halved) if sums.loss.is_finite() => {
                    self.state.loss_scale = Some(halved);
                    watch(&Event::Overflowed {
                        step,
                        loss_scale: halved.factor(),
                    });
                }
                _ => {
                    return Err(Error::NotFinite {
                        step,
                        loss: sums.loss / counted.max(1) as f64,
                        norm,
                        first: self.first_not_finite(batches, &sums.gradients),
                    });
                }
            }
        }
    }

    /// Forward and backward of a step's micro-batches; `share` is what one token counts in the loss that is
    /// differentiated.
    fn sums(&self, batches: &[Batch], share: f64) -> Sums {
        let mut sums = Sums::default();
        for (number, batch) in (self.state.micro_step..).zip(batches) {
            let micro = self.micro_step(batch, number, share, &mut sums.loads);
            sums.gradients.add(micro.gradients);
            sums.loss += micro.loss;
            sums.balance += micro.balance;
            if let Some(rewards) = micro.rewards {
                sums.rewards.get_or_insert_default().add(rewards);
            }
        }
        sums
    }

    /// What the loss is multiplied by before it is differentiated, if by anything.
    fn loss_scale(&self) -> Option<f64> {
        self.state.loss_scale.map(LossScale::factor)
    }

    fn next_batches(&mut self) -> Result<Vec<Batch>> {
        let train = &self.recipe.train;
        let numbers = self.state.micro_step..self.state.micro_step + train.accumulate as u64;
        let batches = numbers.map(|number| self.train.batch(number, self.pad_id));
        batches.collect()
    }

    /// Forward and backward of one micro-batch.
    fn micro_step(
        &self,
        batch: &Batch,
        number: u64,
        share: f64,
        loads: &mut Vec<(usize, Vec<f64>)>,
    ) -> Micro {
        let scale = self.loss_scale().unwrap_or(1.0);
        let train = &self.recipe.train;
        let watches = train.balance_loss > 0.0 || train.bias_update_speed > 0.0;
        let mut pass = Pass {
            dropout_seed: (self.recipe.lora.dropout > 0.0).then_some(train.seed ^ (number << 20)),
            observe: if watches {
                Observe::Routing
            } else {
                Observe::Nothing
            },
            ..Pass::new(self.compute())
        };
        let losses = losses(&self.model, batch, &mut pass, &self.device);
        let (losses, rewards) = self.compared(losses, batch);
        let sum = losses.sum();
        let loss = f64::from(sum.clone().inner().into_scalar::<f32>());
        let mut total = sum * share as f32;
        let mut balance_sum = 0.0;
        if watches {
            let valid = Valid::new(&batch.lengths, batch.cols, &self.device).of_sequences(
                &batch.starts,
                &batch.lengths,
                &self.device,
            );
            for record in &pass.routing {
                add_load(loads, record.layer_idx, balance::load(record, &valid));
                if train.balance_loss > 0.0 {
                    let term = balance::balance_loss(record, &valid);
                    balance_sum += f64::from(term.clone().inner().into_scalar::<f32>());
                    let share = scale * train.balance_loss / train.accumulate as f64;
                    total = total + term * share as f32;
                }
            }
        }
        let mut gradients = total.backward();
        Micro {
            gradients: self.model.gradients(&mut gradients),
            loss,
            balance: balance_sum,
            rewards,
        }
    }

    /// The losses that are learned from, and the sum of what the answers earn if preferences are.
    fn compared(&self, losses: Tensor<1>, batch: &Batch) -> (Tensor<1>, Option<Rewards>) {
        let Some(reference) = &self.reference else {
            return (losses, None);
        };
        let device = self.device.clone().inner();
        let before = self::losses(reference, batch, &mut Pass::new(self.compute()), &device);
        let [policy, before] =
            [losses, before].map(|losses| dpo::log_probabilities(losses, batch.rows));
        let before = match policy.device().is_autodiff() {
            true => Tensor::from_inner(before),
            false => before,
        };
        let (losses, rewards) = dpo::losses(policy, before, &self.recipe.dpo);
        (losses, Some(rewards))
    }

    /// How many things a batch's loss is summed over: its targets, or its pairs.
    fn counted(&self, batch: &Batch) -> usize {
        match self.reference {
            Some(_) => batch.rows / 2,
            None => batch.trained_tokens,
        }
    }

    /// The mean loss over the validation split, if there is one.
    fn validate(
        &self,
        step: u64,
        metrics: &mut Metrics,
        watch: &mut dyn FnMut(&Event),
    ) -> Result<()> {
        let Some(valid) = &self.valid else {
            return Ok(());
        };
        let (model, device) = (self.model.clone().valid(), self.device.clone().inner());
        let eval = &self.recipe.eval;
        let (mut sum, mut counted, mut rewards) = (0.0, 0, None::<Rewards>);
        let limit = eval.max_batches.map_or(usize::MAX, |max| max as usize);
        let indices: Vec<usize> = (0..valid.len()).collect();
        let per_row = if self.reference.is_some() { 2 } else { 1 };
        for indices in indices.chunks(eval.batch_size * per_row).take(limit) {
            let samples = indices.iter().map(|&index| valid.sample(index));
            let samples = samples.collect::<data::Result<Vec<_>>>()?;
            let batch = collate(&samples.iter().collect::<Vec<_>>(), self.pad_id);
            let losses = losses(&model, &batch, &mut Pass::new(self.compute()), &device);
            let (losses, earned) = self.compared(losses, &batch);
            sum += f64::from(losses.sum().into_scalar::<f32>());
            counted += self.counted(&batch);
            if let Some(earned) = earned {
                rewards.get_or_insert_default().add(earned);
            }
        }
        let loss = sum / counted.max(1) as f64;
        let mut line = serde_json::json!({ "valid_loss": loss });
        if let Some(rewards) = rewards {
            let Rewards {
                margin, accuracy, ..
            } = rewards.mean(counted);
            line["valid_rewards/margins"] = margin.into();
            line["valid_rewards/accuracies"] = accuracy.into();
        }
        metrics.append(step, &line)?;
        watch(&Event::Validated { step, loss });
        Ok(())
    }

    fn save(&mut self, run: &RunDir, watch: &mut dyn FnMut(&Event)) -> Result<()> {
        let (specs, tensors) = (self.state_tensors(), self.state_values());
        run.save(self.state.step, |writer| {
            write_optimizer(writer, &specs, |i| {
                Ok(tensors[i].clone().into_data().iter::<f32>().collect())
            })?;
            export::adapter_into(self, writer)?;
            self.state.write(writer)
        })?;
        run.prune(self.recipe.train.keep_last)?;
        watch(&Event::Saved {
            step: self.state.step,
        });
        Ok(())
    }

    /// The tensors of [`Session::state_tensors`], in its order. A parameter without a gradient has moments of zero.
    fn state_values(&mut self) -> Vec<Tensor<1>> {
        let parameters = self.model.parameters();
        let (moments, dtype) = (
            &self.optimizer.moments,
            self.recipe.optimizer.moments().float(),
        );
        let moment = |which: usize| {
            let of = move |p: &Parameter| moments.get(&p.name).map(|pair| pair[which].clone());
            let zeros = |p: &Parameter| {
                Tensor::zeros(p.values.dims(), (&p.values.device(), DType::from(dtype)))
            };
            parameters
                .iter()
                .map(move |p| of(p).unwrap_or_else(|| zeros(p)))
        };
        let mut values: Vec<Tensor<1>> = parameters
            .iter()
            .map(|p| p.values.clone())
            .chain(moment(0))
            .chain(moment(1))
            .collect();
        values.extend(
            self.model
                .correction_biases()
                .map(|(_, bias)| bias.clone().inner()),
        );
        values
    }
}

/// What the micro-batches of a step give together.
#[derive(Default)]
struct Sums {
    gradients: Accumulated,
    /// Over the trained tokens, or pairs.
    loss: f64,
    /// Over the pairs, if preferences are learned.
    rewards: Option<Rewards>,
    /// Over layers and micro-batches.
    balance: f64,
    /// Tokens per expert, by layer.
    loads: Vec<(usize, Vec<f64>)>,
}

/// What one micro-batch gives.
struct Micro {
    gradients: Vec<(String, Tensor<1>)>,
    /// Sum over its trained tokens, or pairs.
    loss: f64,
    /// Sum over its pairs, if preferences are learned.
    rewards: Option<Rewards>,
    /// Sum over layers.
    balance: f64,
}

/// The loss of every position of a batch.
pub(crate) fn losses(
    model: &Model,
    batch: &Batch,
    pass: &mut Pass<'_>,
    device: &Device,
) -> Tensor<1> {
    let tensor = |values: &Vec<i32>| {
        Tensor::<2, Int>::from_data(
            TensorData::new(values.clone(), [batch.rows, batch.cols]),
            device,
        )
    };
    pass.segments = segments(batch);
    let hidden = model.hidden(tensor(&batch.input_ids), pass);
    model.loss(hidden, tensor(&batch.targets), pass)
}

fn add_load(loads: &mut Vec<(usize, Vec<f64>)>, layer_idx: usize, load: Vec<f64>) {
    match loads.iter_mut().find(|(layer, _)| *layer == layer_idx) {
        Some((_, sum)) => sum
            .iter_mut()
            .zip(load)
            .for_each(|(sum, load)| *sum += load),
        None => loads.push((layer_idx, load)),
    }
}
