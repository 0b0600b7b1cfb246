//! The training loop: forward, backward, update; validate, save, log.
//!
//! The loss is averaged over the trained tokens of the whole step: a step of four micro-batches has the gradient of
//! one four times as large, however unevenly the tokens are spread over them. Of preferences it is averaged over pairs.

mod census;
mod experts;
mod host;
mod range_test;
mod trial;
mod validation;
mod watchdog;

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use data::Batch;
use model::{ForwardContext, Model, Observe, Parameter, Trace};
use serde::Serialize;

use crate::balance::{self, Valid};
use crate::dataset::segments;
use crate::dpo::{self, Rewards};
use crate::loss_scale::LossScale;
use crate::metrics::journal::Journal;
use crate::optimizer::Accumulated;
use crate::recipe::Loss;
use crate::run_dir::RunDir;
use crate::schedule::Schedule;
use crate::session::Session;
use crate::state::{State, write_optimizer};
use crate::{Error, Result, export};

pub use self::census::{Census, TensorGradient, Zero};
pub(crate) use self::experts::Picks;
pub use self::experts::{LayerDrift, LayerLoad};
pub use self::host::{Host, Memory};
pub use self::range_test::{RangeTest, RatePoint, steepest};
pub use self::watchdog::Watchdog;

/// What happened, for whoever watches.
#[derive(Clone, Debug)]
pub enum Event {
    /// An update was made.
    Step(StepReport),
    /// The first step's gradient was looked at.
    FirstGradient(Census),
    /// The validation loss was measured.
    Validated {
        /// After which step.
        step: u64,
        /// Mean nats per trained token, or per pair.
        loss: f64,
        /// Means over the pairs, if preferences are learned.
        rewards: Option<Rewards>,
        /// Share of the routers' picks that are not the reference's, where there are both.
        drift: Option<f64>,
    },
    /// Gradients overflowed in f16; the step is taken again with this loss scale.
    Overflowed {
        /// Which step.
        step: u64,
        /// Half of what it was.
        loss_scale: f64,
    },
    /// The model continued the recipe's prompts.
    Sampled {
        /// After which step.
        step: u64,
        /// In the recipe's order.
        samples: Vec<Sample>,
    },
    /// The loss had gone astray, and the run went back.
    RolledBack {
        /// From which step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// The average before it went up.
        smoothed: f64,
        /// The step that the run goes on after.
        to: u64,
    },
    /// The run is over, and this is the step that it leaves.
    TookBest {
        /// With the lowest validation loss.
        step: u64,
        /// That loss.
        loss: f64,
    },
    /// A checkpoint was written.
    Saved {
        /// After which step.
        step: u64,
    },
}

/// What the model writes after a prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// What comes after it.
    pub text: String,
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
    pub saved_activation_bytes: usize,
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
        let mut journal = Journal::open(run, resumed)?;
        let policy = format!("{}\n", self.policy()?);
        checkpoint::write_file(&run.path().join("precision.txt"), policy.as_bytes())?;
        if resumed.is_none() {
            self.sample(&mut journal, host)?;
            // What a spike before the first regular checkpoint goes back to.
            if self.anchor().is_some() {
                self.save(run, host)?;
            }
        }
        // A finished run that is resumed has everything but, perhaps, its result.
        if !self.is_over() {
            self.train(run, &mut journal, host)?;
            self.sample(&mut journal, host)?;
            self.save(run, host)?;
        }
        self.take_best(run, host)?;
        export::result(self, run)
    }

    /// Makes all steps that are left, and measures the last one.
    fn train(&mut self, run: &RunDir, journal: &mut Journal, host: &mut dyn Host) -> Result<()> {
        let (total, train) = (self.total_steps(), self.recipe.train.clone());
        let schedule = Schedule::new(self.recipe.optimizer.learning_rate, &self.recipe.schedule);
        let generate_every = self.recipe.eval.generate_every;
        let due =
            |every: Option<u64>, step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        while !self.is_over() {
            let rate = schedule.rate(self.state.step, total);
            let report = self.step(rate, Some(run), host)?;
            let (step, loss) = (report.step, report.loss);
            let first_batch = self.state.micro_step - train.accumulate as u64;
            if self.roll_back_if_astray((loss, first_batch), (run, journal), host)? {
                continue;
            }
            if step.is_multiple_of(train.log_every) || step == total {
                self.log(&report, journal, host)?;
            }
            host.see(&Event::Step(report));
            let is_best = (due(train.eval_every, step) || step == total)
                && self.validate(step, journal, host)?;
            if self.is_over() {
                break;
            }
            if due(generate_every, step) {
                self.sample(journal, host)?;
            }
            if due(train.save_every, step) || is_best && train.keep_best {
                self.save(run, host)?;
            }
            self.stop_if_asked(run, host)?;
        }
        Ok(())
    }

    /// Whether all steps are made, or the validation loss has stopped falling.
    fn is_over(&self) -> bool {
        let patience = self.recipe.eval.patience;
        let is_spent = patience.is_some_and(|most| self.state.passes_since_best >= most);
        is_spent || self.state.step >= self.total_steps()
    }

    /// Writes a step down, with what the experts got since the last time.
    fn log(
        &mut self,
        report: &StepReport,
        journal: &mut Journal,
        host: &mut dyn Host,
    ) -> Result<()> {
        let loads = std::mem::take(&mut self.state.expert_loads);
        let loads = loads
            .iter()
            .map(|(layer, load)| LayerLoad::new(*layer, load));
        let peak_bytes = host.memory().peak_bytes;
        journal.step(report, &loads.collect::<Vec<_>>(), peak_bytes)
    }

    /// Lets the host continue the recipe's prompts.
    fn sample(&self, journal: &mut Journal, host: &mut dyn Host) -> Result<()> {
        let prompts = &self.recipe.eval.prompts;
        if prompts.is_empty() {
            return Ok(());
        }
        let (model, step) = (self.model.clone().valid(), self.state.step);
        let sample = |prompt: &String| {
            let text = host.generate(&model, prompt);
            let text = text.map_err(|problem| Error::Sample {
                prompt: prompt.clone(),
                problem,
            })?;
            let prompt = prompt.clone();
            Ok(Sample { prompt, text })
        };
        let samples = prompts.iter().map(sample).collect::<Result<Vec<_>>>()?;
        journal.samples(step, &samples)?;
        host.see(&Event::Sampled { step, samples });
        Ok(())
    }

    /// Goes back to the step with the lowest validation loss, if the recipe wants that one.
    fn take_best(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let best = self.state.best.filter(|_| self.recipe.train.keep_best);
        let Some(best) = best.filter(|best| best.step != self.state.step) else {
            return Ok(());
        };
        let path = run.checkpoint_path(best.step);
        if !run.steps()?.contains(&best.step) {
            return Err(Error::NoBest { path });
        }
        self.restore(&path)?;
        host.see(&Event::TookBest {
            step: best.step,
            loss: best.loss,
        });
        Ok(())
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

    /// One update at a learning rate. The first one of a run leaves a census of its gradient.
    fn step(&mut self, rate: f64, run: Option<&RunDir>, host: &mut dyn Host) -> Result<StepReport> {
        let started = Instant::now();
        self.state.micro_step = self.state.watchdog.next_batch(self.state.micro_step);
        let batches = self.next_batches()?;
        let trained_tokens: usize = batches.iter().map(|batch| batch.trained_tokens).sum();
        let counted: usize = batches.iter().map(|batch| self.counted(batch)).sum();
        let (sums, norm) = self.finite_sums(&batches, counted, host)?;
        let (step, scale) = (self.state.step + 1, self.loss_scale());
        if let (1, Some(run)) = (step, run) {
            let census = Census::of(&self.model, &sums);
            census.write(run.path())?;
            host.see(&Event::FirstGradient(census));
        }
        self.note_loads(&sums.loads);
        let numbers = (step, norm, scale.unwrap_or(1.0));
        self.optimizer
            .step(&mut self.model, sums.gradients, rate, numbers);
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
            saved_activation_bytes: kernels::saved_activation_bytes(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// The sums of a step and the norm of its gradient, all finite. Where f16 gradients overflow, the same batches are
    /// taken again with half the loss scale.
    fn finite_sums(
        &mut self,
        batches: &[Batch],
        counted: usize,
        host: &mut dyn Host,
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
                    host.see(&Event::Overflowed {
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

    /// Forward and backward of a step's micro-batches; `share` is what one token, or pair, counts in the loss that is
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
        let mut ctx = ForwardContext {
            dropout_seed: (self.recipe.lora.dropout > 0.0).then_some(train.seed ^ (number << 20)),
            segments: segments(batch),
            observe: Observe::Routing,
            ..ForwardContext::new(self.compute())
        };
        let (mut loss, mut rewards, mut balance) = (0.0, None, 0.0);
        let valid = (train.balance_loss > 0.0)
            .then(|| Valid::new(&batch.starts, &batch.lengths, batch.cols, &self.device));
        let balance_share = scale * train.balance_loss / train.accumulate as f64;
        let tensor = |values| ids(values, batch, &self.device);
        let trace = Trace::new(
            &self.model,
            tensor(&batch.input_ids),
            &mut ctx,
            train.checkpointing.into(),
        );
        let gradients = trace.backward(
            &self.model,
            &mut ctx,
            |hidden, ctx| {
                let losses = self.model.loss(hidden, tensor(&batch.targets), ctx);
                let (losses, earned) = self.compared(losses, batch);
                let sum = losses.sum();
                (loss, rewards) = (scalar(&sum), earned);
                sum * share as f32
            },
            |record| {
                let term = balance::balance_loss(record, valid.as_ref()?);
                balance += scalar(&term);
                Some(term * balance_share as f32)
            },
        );
        for record in &ctx.routing {
            let [_, experts] = record.routed.scores.dims();
            let load = Picks::of(record, &batch.lengths, batch.cols).load(experts);
            add_load(loads, record.layer_idx, load);
        }
        Micro {
            gradients,
            loss,
            balance,
            rewards,
        }
    }

    /// The losses that are learned from, and the sum of what the answers earn if preferences are.
    fn compared(&self, losses: Tensor<1>, batch: &Batch) -> (Tensor<1>, Option<Rewards>) {
        let reference = self
            .reference
            .as_ref()
            .filter(|_| self.learns_preferences());
        let Some(reference) = reference else {
            return (losses, None);
        };
        let device = self.device.clone().inner();
        let before = self::losses(
            reference,
            batch,
            &mut ForwardContext::new(self.compute()),
            &device,
        );
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
        match self.recipe.train.loss {
            Loss::Dpo => batch.rows / 2,
            Loss::CrossEntropy => batch.trained_tokens,
        }
    }

    /// Whether rows come in pairs of a chosen and a rejected answer.
    fn learns_preferences(&self) -> bool {
        self.recipe.train.loss == Loss::Dpo
    }

    /// Adds a step's loads to those since the last line of metrics.
    fn note_loads(&mut self, loads: &[(usize, Vec<f64>)]) {
        for (layer, load) in loads {
            let sums = self.state.expert_loads.entry(*layer).or_default();
            sums.resize(load.len(), 0);
            for (sum, n) in sums.iter_mut().zip(load) {
                *sum = sum.saturating_add(*n as u64);
            }
        }
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
        run.prune(self.recipe.train.keep_last, &self.protected(run)?)?;
        host.see(&Event::Saved {
            step: self.state.step,
        });
        Ok(())
    }

    /// The checkpoints that stay whatever their age: what a spike goes back to, and the best ones, of this step and of all
    /// that a resumed run may start from.
    fn protected(&self, run: &RunDir) -> Result<Vec<u64>> {
        let train = &self.recipe.train;
        let mut protected: Vec<u64> = self.anchor().into_iter().collect();
        if train.keep_best {
            let steps = run.steps()?;
            let newest = steps.iter().rev().take(train.keep_last);
            let starts: Vec<u64> = newest.chain(&protected).copied().collect();
            protected.extend(self.state.best.map(|best| best.step));
            for step in starts {
                let state = State::read(&run.checkpoint_path(step))?;
                protected.extend(state.best.map(|best| best.step));
            }
        }
        Ok(protected)
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
pub(crate) struct Sums {
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
    ctx: &mut ForwardContext<'_>,
    device: &Device,
) -> Tensor<1> {
    let hidden = hidden(model, batch, ctx, device);
    model.loss(hidden, ids(&batch.targets, batch, device), ctx)
}

/// What the head reads at every position of a batch. No sample of a packed row sees another.
fn hidden(
    model: &Model,
    batch: &Batch,
    ctx: &mut ForwardContext<'_>,
    device: &Device,
) -> Tensor<3> {
    ctx.segments = segments(batch);
    model.hidden(ids(&batch.input_ids, batch, device), ctx)
}

fn scalar(x: &Tensor<1>) -> f64 {
    f64::from(x.clone().inner().into_scalar::<f32>())
}

/// Some ids of a batch, `[rows, cols]`.
fn ids(ids: &[i32], batch: &Batch, device: &Device) -> Tensor<2, Int> {
    let shape = [batch.rows, batch.cols];
    Tensor::from_data(TensorData::new(ids.to_vec(), shape), device)
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
