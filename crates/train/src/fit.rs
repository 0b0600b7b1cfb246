//! The training loop: forward, backward, update; validate, save, log.
//!
//! The loss is averaged over the trained tokens of the whole step: a step of four micro-batches has the gradient of
//! one four times as large, however unevenly the tokens are spread over them.

mod host;

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use data::{Batch, collate};
use model::{Model, Observe, Parameter, Pass};
use serde::Serialize;

use crate::balance::{self, Valid};
use crate::loss_scale::LossScale;
use crate::optimizer::Accumulated;
use crate::run_dir::RunDir;
use crate::schedule::Schedule;
use crate::session::Session;
use crate::state::write_optimizer;
use crate::{Error, Metrics, Result, export};

pub use self::host::{Host, Memory};

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
    /// Mean nats per trained token, over the step.
    pub loss: f64,
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
    /// If a loss or gradient is not finite, or writing fails: the latest checkpoint stays. If the host asks to stop or
    /// memory runs short: the last step is saved before.
    pub fn fit(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let resumed = (self.state.step > 0).then_some(self.state.step);
        let mut metrics = run.metrics(resumed)?;
        let policy = format!("{}\n", self.policy()?);
        checkpoint::write_file(&run.path().join("precision.txt"), policy.as_bytes())?;
        let (total, train) = (self.total_steps(), self.recipe.train.clone());
        let due =
            |every: Option<u64>, step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        let mut validated = None;
        while self.state.step < total {
            let report = self.step(total, host)?;
            let step = report.step;
            if step.is_multiple_of(train.log_every) || step == total {
                metrics.append(step, &report)?;
            }
            host.see(&Event::Step(report));
            if due(train.eval_every, step) {
                self.validate(step, &mut metrics, host)?;
                validated = Some(step);
            }
            if step < total {
                if due(train.save_every, step) {
                    self.save(run, host)?;
                }
                self.stop_if_asked(run, host)?;
            }
        }
        // A finished run that is resumed has all this, and may lack its result only.
        if resumed != Some(total) {
            if validated != Some(total) {
                self.validate(total, &mut metrics, host)?;
            }
            self.save(run, host)?;
        }
        export::result(self, run)
    }

    /// Saves and fails if the host was told to stop, or if memory runs short.
    fn stop_if_asked(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let (step, path) = (self.state.step, run.path().to_owned());
        let error = if let Some(signal) = host.interrupted() {
            Error::Interrupted {
                run: path,
                step,
                signal,
            }
        } else if let Some(available_bytes) = host.memory().shortage() {
            Error::LowMemory {
                run: path,
                step,
                available_bytes,
                limit_bytes: Memory::LEAST_AVAILABLE_BYTES,
            }
        } else {
            return Ok(());
        };
        self.save(run, host)?;
        Err(error)
    }

    /// One update.
    fn step(&mut self, total: u64, host: &mut dyn Host) -> Result<StepReport> {
        let started = Instant::now();
        let batches = self.next_batches();
        let trained_tokens: usize = batches.iter().map(|batch| batch.trained_tokens).sum();
        let (sums, norm) = self.finite_sums(&batches, trained_tokens, host)?;
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
            loss: sums.loss / trained_tokens.max(1) as f64,
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
        trained_tokens: usize,
        host: &mut dyn Host,
    ) -> Result<(Sums, f64)> {
        loop {
            let scale = self.loss_scale();
            let sums = self.sums(batches, scale.unwrap_or(1.0) / trained_tokens.max(1) as f64);
            let norm = sums.gradients.norm() / scale.unwrap_or(1.0);
            if sums.loss.is_finite() && norm.is_finite() {
                return Ok((sums, norm));
            }
            let step = self.state.step + 1;
            let halved = self.state.loss_scale.and_then(LossScale::halved);
            match halved {
                Some(halved) if sums.loss.is_finite() => {
                    self.state.loss_scale = Some(halved);
                    host.see(&Event::Overflowed {
                        step,
                        loss_scale: halved.factor(),
                    });
                }
                _ => {
                    return Err(Error::NotFinite {
                        step,
                        loss: sums.loss / trained_tokens.max(1) as f64,
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
        }
        sums
    }

    /// What the loss is multiplied by before it is differentiated, if by anything.
    fn loss_scale(&self) -> Option<f64> {
        self.state.loss_scale.map(LossScale::factor)
    }

    fn next_batches(&mut self) -> Vec<Batch> {
        let train = &self.recipe.train;
        let numbers = self.state.micro_step..self.state.micro_step + train.accumulate as u64;
        let mut batch = |number| {
            let samples: Vec<_> = self
                .order
                .batch(number, train.batch_size)
                .into_iter()
                .map(|i| &self.train.samples[i])
                .collect();
            collate(&samples, self.pad_id)
        };
        numbers.map(&mut batch).collect()
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
        let sum = losses.sum();
        let loss = f64::from(sum.clone().inner().into_scalar::<f32>());
        let mut total = sum * share as f32;
        let mut balance_sum = 0.0;
        if watches {
            let valid = Valid::new(&batch.lengths, batch.cols, &self.device);
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
        }
    }

    /// The mean loss over the validation split, if there is one.
    fn validate(&self, step: u64, metrics: &mut Metrics, host: &mut dyn Host) -> Result<()> {
        let Some(valid) = &self.valid else {
            return Ok(());
        };
        let (model, device) = (self.model.clone().valid(), self.device.clone().inner());
        let eval = &self.recipe.eval;
        let (mut sum, mut tokens) = (0.0, 0);
        let limit = eval.max_batches.map_or(usize::MAX, |max| max as usize);
        for samples in valid.samples.chunks(eval.batch_size).take(limit) {
            let batch = collate(&samples.iter().collect::<Vec<_>>(), self.pad_id);
            let losses = losses(&model, &batch, &mut Pass::new(self.compute()), &device);
            sum += f64::from(losses.sum().into_scalar::<f32>());
            tokens += batch.trained_tokens;
        }
        let loss = sum / tokens.max(1) as f64;
        metrics.append(step, &serde_json::json!({ "valid_loss": loss }))?;
        host.see(&Event::Validated { step, loss });
        Ok(())
    }

    fn save(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let (specs, tensors) = (self.state_tensors(), self.state_values());
        run.save(self.state.step, |writer| {
            write_optimizer(writer, &specs, |i| {
                Ok(tensors[i].clone().into_data().iter::<f32>().collect())
            })?;
            export::adapter_into(self, writer)?;
            self.state.write(writer)
        })?;
        run.prune(self.recipe.train.keep_last)?;
        host.see(&Event::Saved {
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
    /// Over the trained tokens.
    loss: f64,
    /// Over layers and micro-batches.
    balance: f64,
    /// Tokens per expert, by layer.
    loads: Vec<(usize, Vec<f64>)>,
}

/// What one micro-batch gives.
struct Micro {
    gradients: Vec<(String, Tensor<1>)>,
    /// Sum over its trained tokens.
    loss: f64,
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
