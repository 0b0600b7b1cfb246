//! One update: forward and backward of its micro-batches, then the optimizer.
//!
//! The loss is averaged over the trained tokens of the whole step: a step of four micro-batches has the gradient of one
//! four times as large, however unevenly the tokens are spread over them. The loss of preferences is averaged over pairs.

use std::collections::BTreeMap;
use std::time::Instant;

use burn::tensor::Tensor;
use data::Batch;
use model::{ForwardContext, Model, Objective, Recorder, RoutingRecord, Trace};
use parallel::{MessageReader, MessageWriter, ShortMessage};

use super::forward::{ids, losses};
use super::grad_audit::GradAudit;
use super::reads::{ChoicesRead, Read, ReadValues, Reads};
use super::step_memory::StepTally;
use crate::balance::{self, RealTokens};
use crate::dataset::segments;
use crate::dpo::{self, Rewards};
use crate::events::{Event, Host, StepReport};
use crate::loss_scale::LossScale;
use crate::optimizer::{Accumulated, StepScalars};
use crate::recipe::Loss;
use crate::routing::{ExpertLoads, add_load};
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::{Error, Result};

/// Sums over the micro-batches of a step, or the batches of a validation pass.
#[derive(Default)]
pub(super) struct StepSums {
    gradients: Accumulated,
    /// Over the trained tokens, or pairs.
    pub(super) loss: f64,
    /// Over the pairs, if preferences are learned.
    pub(super) rewards: Option<Rewards>,
    /// Over layers and micro-batches.
    balance: f64,
    loads: ExpertLoads,
}

/// The sums of one micro-batch, or of a validation batch.
#[derive(Default)]
pub(super) struct MicroSums {
    pub(super) loss: f64,
    pub(super) rewards: Option<Rewards>,
    /// Over layers.
    pub(super) balance: f64,
    pub(super) loads: ExpertLoads,
}

/// The results of one micro-batch, some of which are still on the device.
struct MicroStep {
    gradients: Vec<(String, Tensor<1>)>,
    /// Sum over its trained tokens, or pairs.
    loss: Option<Read>,
    /// Of both answers of its pairs, if preferences are learned.
    rewards: Option<Read>,
    /// Of each layer.
    balance: Vec<Read>,
    /// Of each layer's router.
    choices: Vec<ChoicesRead>,
}

impl StepSums {
    pub(super) fn add(&mut self, micro: MicroSums) {
        self.loss += micro.loss;
        self.balance += micro.balance;
        for (layer_idx, load) in micro.loads {
            add_load(&mut self.loads, layer_idx, load);
        }
        if let Some(rewards) = micro.rewards {
            self.rewards.get_or_insert_default().add(rewards);
        }
    }
}

impl MicroSums {
    fn of(micro: MicroStep, batch: &Batch, values: &ReadValues) -> Self {
        let mut sums = Self {
            loss: micro.loss.map_or(0.0, |read| values.scalar(read)),
            rewards: micro.rewards.map(|read| Rewards::sum(values.of(read))),
            ..Self::default()
        };
        let balance = micro.balance.iter().map(|read| values.scalar(*read));
        sums.balance = balance.fold(0.0, |sum, term| sum + term);
        for choices in micro.choices {
            let load = values.choices(choices, batch).load(choices.n_experts);
            add_load(&mut sums.loads, choices.layer_idx, load);
        }
        sums
    }

    pub(super) fn message(&self) -> Vec<u8> {
        let mut message = MessageWriter::default();
        message.number(self.loss).number(self.balance);
        message.count(u64::from(self.rewards.is_some()));
        if let Some(rewards) = self.rewards {
            message.number(rewards.chosen).number(rewards.rejected);
            message.number(rewards.margin).number(rewards.accuracy);
        }
        for (layer_idx, load) in &self.loads {
            message.count(*layer_idx as u64).count(load.len() as u64);
            load.iter().for_each(|n| _ = message.number(*n));
        }
        message.finish()
    }

    pub(super) fn read(message: &[u8]) -> std::result::Result<Self, ShortMessage> {
        let mut reader = MessageReader::new(message);
        let mut sums = Self {
            loss: reader.number()?,
            balance: reader.number()?,
            ..Self::default()
        };
        if reader.count()? > 0 {
            sums.rewards = Some(Rewards {
                chosen: reader.number()?,
                rejected: reader.number()?,
                margin: reader.number()?,
                accuracy: reader.number()?,
            });
        }
        while !reader.is_empty() {
            let (layer_idx, len) = (reader.count()? as usize, reader.count()?);
            let load = (0..len).map(|_| reader.number());
            sums.loads
                .push((layer_idx, load.collect::<std::result::Result<_, _>>()?));
        }
        Ok(sums)
    }
}

/// What a pass finds of a micro-batch.
#[derive(Default)]
struct MicroTerms {
    loss: Option<Tensor<1>>,
    rewards: Option<Tensor<1>>,
    balance: Vec<Tensor<1>>,
}

/// The loss of micro-batches that take turns.
struct StepObjective<'a> {
    session: &'a Session,
    turns: &'a [(u64, &'a Batch)],
    /// The weight of a token or pair.
    share: f64,
    /// The tokens that are balanced, if any are.
    real_tokens: Vec<Option<RealTokens>>,
    found: Vec<MicroTerms>,
}

impl<'a> StepObjective<'a> {
    fn new(session: &'a Session, turns: &'a [(u64, &'a Batch)], share: f64) -> Self {
        let is_balanced = session.recipe.train.balance_loss > 0.0;
        let real_tokens = |(_, batch): &(u64, &Batch)| {
            let new =
                || RealTokens::new(&batch.starts, &batch.lengths, batch.cols, &session.device);
            is_balanced.then(new)
        };
        Self {
            session,
            turns,
            share,
            real_tokens: turns.iter().map(real_tokens).collect(),
            found: turns.iter().map(|_| MicroTerms::default()).collect(),
        }
    }
}

impl Objective for StepObjective<'_> {
    fn loss(&mut self, number: usize, hidden: Tensor<3>, ctx: &ForwardContext<'_>) -> Tensor<1> {
        let (session, (_, batch)) = (self.session, self.turns[number]);
        let targets = ids(&batch.targets, batch, &session.device);
        let losses = session.model.loss(hidden, targets, ctx);
        let (losses, rewards) = session.compared(losses, batch);
        let sum = kernels::total(losses);
        let found = &mut self.found[number];
        (found.loss, found.rewards) = (Some(sum.clone()), rewards);
        sum * self.share as f32
    }

    fn term(&mut self, number: usize, record: &RoutingRecord) -> Option<Tensor<1>> {
        let term = balance::balance_loss(record, self.real_tokens[number].as_ref()?);
        self.found[number].balance.push(term.clone());
        let (train, scale) = (&self.session.recipe.train, self.session.loss_scale());
        let share = scale.unwrap_or(1.0) * train.balance_loss / train.accumulate as f64;
        Some(term * share as f32)
    }
}

impl Session {
    /// One update at a learning rate. The gradient of a run's first update is audited.
    pub(super) fn step(
        &mut self,
        rate: f64,
        run: Option<&RunDir>,
        host: &mut dyn Host,
    ) -> Result<StepReport> {
        let started = Instant::now();
        self.state.micro_step = self.state.watchdog.next_batch(self.state.micro_step);
        let batches = self.next_batches()?;
        let trained_tokens: usize = batches.iter().map(|batch| batch.trained_tokens).sum();
        let counted: usize = batches.iter().map(|batch| self.counted(batch)).sum();
        let mut tally = StepTally::begin();
        let (sums, norm) = self.finite_sums(&batches, counted, (&mut tally, host))?;
        let (step, scale) = (self.state.step + 1, self.loss_scale());
        if let (1, Some(run)) = (step, run) {
            self.audit(&sums, run, host)?;
        }
        self.note_loads(&sums.loads);
        let scalars = StepScalars {
            number: step,
            rate,
            norm,
            loss_scale: scale.unwrap_or(1.0),
        };
        let ranks = &self.ranks;
        let first_element = |name: &str| ranks.first_element(name);
        (self.optimizer).step(&mut self.model, sums.gradients, scalars, &first_element);
        let device = self.device();
        self.ranks.share(&mut self.model, &device)?;
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
            memory: tally.end(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Audits the gradient of a run's first step, on the first rank.
    fn audit(&self, sums: &StepSums, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let parameters = self.model.parameters();
        let facts = self.ranks.gradient_facts(&sums.gradients, &parameters)?;
        if self.ranks.world.is_first() {
            let experts = |name: &str| self.model.updated_experts(name);
            let audit = GradAudit::new(&parameters, &experts, &facts, &sums.loads);
            audit.write(run.path())?;
            host.see(&Event::FirstGradient(audit));
        }
        Ok(())
    }

    /// The sums of a step and the norm of its gradient, all finite. If f16 gradients overflow, the same batches are
    /// repeated with half the loss scale.
    fn finite_sums(
        &mut self,
        batches: &[Batch],
        counted: usize,
        (tally, host): (&mut StepTally, &mut dyn Host),
    ) -> Result<(StepSums, f64)> {
        loop {
            let scale = self.loss_scale();
            let share = scale.unwrap_or(1.0) / counted.max(1) as f64;
            let (sums, norm) = self.sums(batches, share, tally)?;
            let norm = norm / scale.unwrap_or(1.0);
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
                        first: self.first_not_finite(batches, &sums.gradients)?,
                    });
                }
            }
        }
    }

    /// Forward and backward of a step's micro-batches, and the norm of the gradient. `share` is the weight of one token, or
    /// pair, in the loss that is differentiated. A rank that is alone waits for the device once, at the end; others wait once
    /// more in each round, to send its gradients.
    fn sums(
        &self,
        batches: &[Batch],
        share: f64,
        tally: &mut StepTally,
    ) -> Result<(StepSums, f64)> {
        let (mut sums, mut reads, mut micros) = (StepSums::default(), Reads::default(), vec![]);
        let own: Vec<(u64, &Batch)> =
            (self.ranks.own((self.state.micro_step..).zip(batches))).collect();
        for turns in own.chunks(self.ranks.turns()) {
            tally.begin_pass();
            let steps = self
                .micro_steps(turns, share, &mut reads, tally)
                .into_iter();
            for (mut micro, (_, batch)) in steps.zip(turns) {
                let gradients = std::mem::take(&mut micro.gradients);
                self.ranks
                    .add(&mut sums.gradients, gradients, &self.device())?;
                micros.push((micro, *batch));
            }
        }
        let stacks = self.stacks();
        let squares: Vec<(String, Read)> = (sums.gradients.squares(&stacks))
            .map(|(name, square)| (name.clone(), reads.push(square)))
            .collect();
        let values = reads.read();
        let micros = micros.into_iter();
        let micros = micros.map(|(micro, batch)| MicroSums::of(micro, batch, &values).message());
        for message in self.ranks.in_order(micros.collect(), batches.len())? {
            sums.add(MicroSums::read(&message)?);
        }
        let squares = squares
            .into_iter()
            .map(|(name, read)| (name, values.of(read).to_vec()));
        let squares = self.ranks.squares(squares.collect())?;
        Ok((sums, squares.values().sum::<f64>().sqrt()))
    }

    /// The stacks that are trained, and how many experts this rank has of each.
    fn stacks(&self) -> BTreeMap<String, usize> {
        let parameters = self.model.parameters().into_iter();
        let stacks = parameters.filter_map(|parameter| match parameter.shape[..] {
            [experts, _, _] => Some((parameter.name, experts)),
            _ => None,
        });
        stacks.collect()
    }

    /// The factor of the loss before it is differentiated, if there is one.
    fn loss_scale(&self) -> Option<f64> {
        self.state.loss_scale.map(LossScale::factor)
    }

    fn next_batches(&mut self) -> Result<Vec<Batch>> {
        let train = &self.recipe.train;
        let numbers = self.state.micro_step..self.state.micro_step + train.accumulate as u64;
        let batches = numbers.map(|number| self.train.batch(number, self.pad_id));
        batches.collect()
    }

    /// Forward and backward of micro-batches that take turns, by their numbers.
    fn micro_steps(
        &self,
        turns: &[(u64, &Batch)],
        share: f64,
        reads: &mut Reads,
        tally: &mut StepTally,
    ) -> Vec<MicroStep> {
        let train = &self.recipe.train;
        let mut recorders: Vec<Recorder> = turns.iter().map(|_| Recorder::of_routing()).collect();
        let passes = recorders.iter_mut().zip(turns);
        let passes = passes.map(|(recorder, (number, batch))| ForwardContext {
            dropout_seed: (self.recipe.lora.dropout > 0.0).then_some(train.seed ^ (number << 20)),
            segments: segments(batch),
            ..ForwardContext::recorded(self.compute(), recorder)
        });
        let mut passes: Vec<ForwardContext<'_>> = passes.collect();
        let inputs = turns.iter();
        let inputs = inputs.map(|(_, batch)| ids(&batch.input_ids, batch, &self.device));
        let traces = Trace::new(
            &self.model,
            inputs.collect(),
            &mut passes,
            train.checkpointing,
        );
        tally.end_forward();
        let mut objective = StepObjective::new(self, turns, share);
        let gradients = Trace::backward(traces, &self.model, &mut passes, &mut objective);
        let found = objective.found;
        drop(passes);
        let all = gradients.into_iter().zip(found).zip(&recorders);
        let micro = |((gradients, found), recorder): ((_, MicroTerms), &Recorder)| MicroStep {
            gradients,
            loss: found.loss.map(|loss| reads.push(loss)),
            balance: (found.balance.into_iter())
                .map(|term| reads.push(term))
                .collect(),
            choices: reads.push_choices(recorder),
            rewards: found.rewards.map(|rewards| reads.push(rewards)),
        };
        all.map(micro).collect()
    }

    /// The model relative to which preferences are learned, if they are.
    pub(super) fn compared_with(&self) -> Option<&Model> {
        let base = self.reference.as_ref().map(|reference| &reference.model);
        let reference = self.start.as_ref().or(base);
        reference.filter(|_| self.learns_preferences())
    }

    /// The losses to minimize, and the rewards of all answers if preferences are learned.
    pub(super) fn compared(
        &self,
        losses: Tensor<1>,
        batch: &Batch,
    ) -> (Tensor<1>, Option<Tensor<1>>) {
        let Some(reference) = self.compared_with() else {
            return (losses, None);
        };
        let before = self::losses(
            reference,
            batch,
            &mut ForwardContext::new(self.compute()),
            &self.device(),
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

    /// The number of terms in a batch's loss: its targets, or its pairs.
    pub(super) fn counted(&self, batch: &Batch) -> usize {
        match self.recipe.train.loss {
            Loss::Dpo => batch.rows / 2,
            Loss::CrossEntropy => batch.trained_tokens,
        }
    }

    /// Adds a step's loads to those since the last line of metrics.
    fn note_loads(&mut self, loads: &ExpertLoads) {
        for (layer, load) in loads {
            let sums = self.state.expert_loads.entry(*layer).or_default();
            sums.resize(load.len(), 0);
            for (sum, n) in sums.iter_mut().zip(load) {
                *sum = sum.saturating_add(*n as u64);
            }
        }
    }
}
