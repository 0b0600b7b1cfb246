//! The training loop: update, validate, save, log.

mod diagnosis;
mod forward;
pub(crate) mod grad_audit;
pub(crate) mod joining;
mod range_test;
pub(crate) mod ranks;
mod reads;
mod step;
pub(crate) mod step_memory;
mod timed_steps;
mod validation;
mod watchdog;

use std::collections::BTreeMap;

use burn::module::Module;
use parallel::Ask;

use self::ranks::SharedValues;
use crate::events::{Event, Host, Memory, SampledText, StepReport, TaskScore};
use crate::metrics::LastLine;
use crate::metrics::journal::{Journal, SplitCounts};
use crate::recipe::{KeepBest, Method};
use crate::routing::LayerLoad;
use crate::run_dir::RunDir;
use crate::schedule::Schedule;
use crate::session::Session;
use crate::{Error, Result, export};

pub use self::grad_audit::{GradAudit, TensorGradient, ZeroGradient};
pub use self::range_test::{RangeTest, RatePoint, steepest};
pub use self::ranks::RankLayout;

impl Session {
    /// Trains to the end of the recipe. Writes metrics and checkpoints to `run`, and the result at the end: `adapter/` or
    /// `model/`.
    ///
    /// # Errors
    /// If a loss or gradient is not finite, or writing fails: the latest checkpoint stays. If the host asks to stop or
    /// memory runs short: the last step is saved first.
    pub fn fit(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        self.expect_alike()?;
        let resumed = (self.state.step > 0).then_some(LastLine {
            step: self.state.step,
            validation_due: self.state.validation_due,
        });
        let mut journal = self.journal(run, resumed)?;
        let policy = format!("{}\n", self.policy()?);
        checkpoint::write_file(&run.path().join("precision.txt"), policy.as_bytes())?;
        if resumed.is_none() {
            journal.data(&self.split_counts())?;
            self.sample(&mut journal, host)?;
            self.score(&mut journal, host)?;
            // A spike before the first regular checkpoint goes back to this one.
            if self.anchor().is_some() {
                self.save(run, host)?;
            }
        }
        // A finished run that is resumed has everything but, perhaps, its result.
        if self.is_unfinished() {
            self.set_result_aside(run, host)?;
            self.train(run, &mut journal, host)?;
            let found = host.memory();
            // What a GPU holds is not predicted.
            if found.own_bytes.is_some() && !kernels::device::is_gpu(&self.device) {
                journal.memory(self.state.step, &self.plan, found)?;
            }
            self.sample(&mut journal, host)?;
            self.score(&mut journal, host)?;
            self.save(run, host)?;
        }
        self.restore_best(run, host)?;
        self.write_result(run)
    }

    /// Writes the adapter, or the model: the first rank asks the others for one expert after another.
    fn write_result(&self, run: &RunDir) -> Result<()> {
        let model = match self.recipe.train.method {
            Method::Lora => self.ranks.whole_model(&self.model, &self.device())?,
            Method::Full => self.model.clone(),
        };
        let shared = SharedValues::new(&self.ranks, &self.model);
        let write = |ask: &mut Ask<'_>| {
            let read_values = &mut |name: &str, range| shared.read(ask, name, range);
            export::result(self, &model, run, read_values).map(|()| Vec::new())
        };
        let world = &self.ranks.world;
        world.first_asks("result", write, |i| shared.answer(i))?;
        Ok(())
    }

    /// Refuses ranks with another program, recipe, base or other rows.
    fn expect_alike(&self) -> Result<()> {
        let state = &self.state;
        self.ranks.expect_alike(&[
            ("version", env!("CARGO_PKG_VERSION")),
            ("layout", &self.ranks.layout.to_string()),
            ("recipe", &state.settings),
            ("model", &state.model_hash),
            ("data", &state.data_hash),
            ("step", &state.step.to_string()),
        ])
    }

    /// The journal of a run, continued after a line or from its beginning; another rank than the first has a new one.
    fn journal(&self, run: &RunDir, last: Option<LastLine>) -> Result<Journal> {
        Journal::open(run.path(), last.filter(|_| self.ranks.world.is_first()))
    }

    /// Makes the remaining steps, and validates after the last one.
    fn train(&mut self, run: &RunDir, journal: &mut Journal, host: &mut dyn Host) -> Result<()> {
        let (total, train) = (self.total_steps(), self.recipe.train.clone());
        let schedule = Schedule::new(self.recipe.optimizer.learning_rate, &self.recipe.schedule);
        let (generate_every, tasks_every) = {
            let eval = &self.recipe.eval;
            (eval.generate_every, eval.tasks_every)
        };
        let due =
            |every: Option<u64>, step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        while self.is_unfinished() {
            // The last process may have been stopped in the validation pass of its last step.
            if !self.state.validation_due {
                let rate = schedule.rate(self.state.step, total);
                let report = self.step(rate, Some(run), host)?;
                let (step, loss) = (report.step, report.loss);
                let first_batch = self.state.micro_step - train.accumulate as u64;
                if self.roll_back_if_astray(loss, first_batch, run, journal, host)? {
                    continue;
                }
                if step.is_multiple_of(train.log_every) || step == total {
                    self.log(&report, journal, host)?;
                }
                host.see(&Event::Step(report));
                let is_due = due(train.eval_every, step) || step == total;
                self.state.validation_due = is_due && self.valid.is_some();
            }
            let step = self.state.step;
            let has_best_loss = self.state.validation_due && self.validate(run, journal, host)?;
            if self.is_over() {
                break;
            }
            if due(generate_every, step) {
                self.sample(journal, host)?;
            }
            let has_best_score = due(tasks_every, step) && self.score(journal, host)?;
            let is_best = match train.keep_best {
                KeepBest::Loss(is_on) => is_on && has_best_loss,
                KeepBest::Score(_) => has_best_score,
            };
            if due(train.save_every, step) || is_best {
                self.save(run, host)?;
            }
            self.stop_if_asked(run, host)?;
        }
        Ok(())
    }

    /// Whether there is a step or a validation pass to make.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.state.validation_due || !self.is_over()
    }

    /// Gives the result of a finished run that goes on another name, so that the run can have a new one.
    fn set_result_aside(&self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let step = self.state.step;
        if let Some(path) = export::set_aside(self, run, step)? {
            host.see(&Event::SetAside { step, path });
        }
        Ok(())
    }

    /// The sizes of the splits, for the metrics.
    fn split_counts(&self) -> BTreeMap<&'static str, SplitCounts> {
        let train = ("train", SplitCounts::of(&self.train.corpus));
        let valid = self.valid.as_ref();
        let valid = valid.map(|corpus| ("valid", SplitCounts::of(corpus)));
        [train].into_iter().chain(valid).collect()
    }

    /// Whether all steps are made, or the validation loss has stopped falling.
    fn is_over(&self) -> bool {
        let patience = self.recipe.eval.patience;
        let is_spent = patience.is_some_and(|most| self.state.passes_since_best >= most);
        is_spent || self.state.step >= self.total_steps()
    }

    /// Logs a step, with the experts' load since the last line.
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
        let step = self.state.step;
        // The first rank writes them, while the others wait.
        let mut samples = Vec::new();
        self.ranks.world.first_does("samples", || {
            samples = self.samples(prompts, host)?;
            Ok::<_, Error>(Vec::new())
        })?;
        journal.samples(step, &samples)?;
        host.see(&Event::Sampled { step, samples });
        Ok(())
    }

    fn samples(&self, prompts: &[String], host: &mut dyn Host) -> Result<Vec<SampledText>> {
        let model = self.model.clone().valid();
        let sample = |prompt: &String| {
            let text = host.generate(&model, prompt);
            let text = text.map_err(|problem| Error::Sample {
                prompt: prompt.clone(),
                problem,
            })?;
            let prompt = prompt.clone();
            Ok(SampledText { prompt, text })
        };
        prompts.iter().map(sample).collect()
    }

    /// Lets the host ask the recipe's tasks. Returns whether the score that the best checkpoint is best in is the best so far.
    fn score(&mut self, journal: &mut Journal, host: &mut dyn Host) -> Result<bool> {
        if self.recipe.eval.tasks.is_empty() {
            return Ok(false);
        }
        let step = self.state.step;
        let scores = self.scores(step, host)?;
        journal.scores(step, &scores)?;
        let is_best = match self.recipe.train.keep_best.score() {
            None => false,
            // What was not learned yet is no result.
            Some(names) if step == 0 => {
                kept_score(&scores, names)?;
                false
            }
            Some(names) => {
                let kept = kept_score(&scores, names)?;
                self.state.note_score(kept.value, kept.is_higher_better)
            }
        };
        host.see(&Event::Scored { step, scores });
        Ok(is_best)
    }

    /// The scores of the recipe's tasks, of the model after a step. The first rank asks them, while the others wait.
    fn scores(&self, step: u64, host: &mut dyn Host) -> Result<Vec<TaskScore>> {
        let model = self.model.clone().valid();
        let scores = self.ranks.world.first_does("scores", || {
            let scores = host.score(step, &model);
            let scores = scores.map_err(|problem| Error::Tasks { problem })?;
            Ok::<_, Error>(serde_json::to_vec(&scores).expect("scores have only string keys"))
        })?;
        let scores = serde_json::from_slice(&scores);
        scores.map_err(|problem| Error::Tasks {
            problem: problem.to_string(),
        })
    }

    /// Restores the best step, if the recipe says so.
    fn restore_best(&mut self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let keep = &self.recipe.train.keep_best;
        let best = self.state.best_step(keep);
        let Some(step) = best.filter(|step| *step != self.state.step) else {
            return Ok(());
        };
        let keep_is_loss = keep.score().is_none();
        let (measure, value) = match keep.score() {
            Some(names) => (
                names.to_owned(),
                self.state.best_score.map(|best| best.value),
            ),
            None => (
                "validation loss".into(),
                self.state.best.map(|best| best.loss),
            ),
        };
        let path = run.checkpoint_path(step);
        self.ranks.world.first_does("best checkpoint", || {
            let is_kept = run.steps()?.contains(&step);
            let path = path.clone();
            is_kept.then(Vec::new).ok_or(Error::NoBest { path })
        })?;
        self.restore(&path)?;
        host.see(&Event::RestoredBest {
            step,
            measure,
            value: value.unwrap_or(f64::NAN),
        });
        // The step of the lowest loss may be one after which no task was asked.
        if keep_is_loss && !self.recipe.eval.tasks.is_empty() {
            let scores = self.scores(step, host)?;
            host.see(&Event::Scored { step, scores });
        }
        Ok(())
    }

    /// Saves and fails if the host asks to stop, or if memory runs short.
    pub(super) fn stop_if_asked(&self, run: &RunDir, host: &mut dyn Host) -> Result<()> {
        let (step, path) = (self.state.step, run.path().to_owned());
        let [signal, shortage] = self.ranks.vote([
            host.interrupted().map(|signal| signal as u64),
            host.memory().shortage(),
        ])?;
        let error = if let Some(signal) = signal {
            Error::Interrupted {
                run: path,
                step,
                signal: signal as i32,
            }
        } else if let Some(available_bytes) = shortage {
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
}

/// The score that the best checkpoint is best in.
fn kept_score<'a>(scores: &'a [TaskScore], names: &str) -> Result<&'a TaskScore> {
    let name = |score: &TaskScore| format!("{} {}", score.task, score.metric);
    let is_kept = |score: &&TaskScore| names.split_whitespace().eq([&*score.task, &*score.metric]);
    scores.iter().find(is_kept).ok_or_else(|| {
        let known: Vec<String> = scores.iter().map(name).collect();
        Error::Tasks {
            problem: format!(
                "expected `{names}` of `train.keep_best` among the scores, found {}",
                known.join(", ")
            ),
        }
    })
}
