//! The progress of a run on the terminal, and the machine's state for the run.

use model::Model;
use train::{
    Event, Host, Memory, Rewards, RunDir, SampledText, Session, StepMemory, StepReport, TaskScore,
    ValidationProgress,
};

use super::samples::PromptSampler;
use super::signals::Signals;
use super::task_scorer::{RecipeTasks, TaskScorer};
use crate::console::{self, Console, Progress};
use crate::host;
use crate::host::energy::EnergyMeter;
use crate::host::machine::Machine;
use crate::host::resident::{Resident, ResidentPeak};
use crate::plan::run_memory::MeasuredMemory;

/// Shows a run's progress, and tells the run about signals and memory.
#[derive(Debug)]
pub(super) struct Watcher {
    progress: Progress,
    /// Of the validation pass under way.
    validation: Option<Progress>,
    signals: Signals,
    sampler: Option<PromptSampler>,
    scorer: Option<TaskScorer>,
    smoothed: Option<f64>,
    seconds: f64,
    tokens: usize,
    saved_activation_bytes: usize,
    step_memory: StepMemory,
    peak: ResidentPeak,
    /// None where the machine does not tell.
    energy: Option<EnergyMeter>,
}

impl Host for Watcher {
    fn see(&mut self, event: &Event) {
        match event {
            Event::Step(report) => self.step(report),
            Event::FirstGradient(audit) => self.progress.line(&audit.summary()),
            Event::Validating(done) => self.validating(done),
            Event::Validated {
                step,
                loss,
                rewards,
                drift,
            } => {
                if let Some(progress) = self.validation.take() {
                    progress.finish();
                }
                let drift = drift.map_or_else(String::new, |drift| {
                    format!(
                        ", {:.1} % of expert choices differ from the base's",
                        100.0 * drift
                    )
                });
                let meaning = meaning_of(*loss, *rewards);
                self.progress.line(&format!(
                    "step {step}: validation loss {loss:.4}, {meaning}{drift}"
                ));
            }
            Event::Overflowed { step, loss_scale } => self.progress.line(&format!(
                "step {step}: gradients overflowed; repeating it with a loss scale of {loss_scale}"
            )),
            Event::RolledBack {
                step,
                loss,
                smoothed,
                to,
            } => self.progress.line(&format!(
                "step {step}: loss {loss:.4} after {smoothed:.4} on average; rolling back to step {to} and skipping the \
                 batches that caused it"
            )),
            Event::Sampled { step, samples } => {
                for SampledText { prompt, text } in samples {
                    let line = format!("step {step}: {prompt} → {text}");
                    self.progress.line(&console::printable(&line, &[]));
                }
            }
            Event::Scored { step, scores } => {
                for score in scores {
                    self.progress.line(&console::printable(&line_of(*step, score), &[]));
                }
            }
            Event::RestoredBest {
                step,
                measure,
                value,
            } => self.progress.line(&format!(
                "the result is step {step}, which had the best {measure}, {value:.4}"
            )),
            Event::SetAside { step, path } => self.progress.line(&format!(
                "the result of step {step} is now {}; this run makes a new one",
                path.display()
            )),
            Event::Saved { .. } => {}
        }
    }

    fn interrupted(&mut self) -> Option<i32> {
        self.signals.received()
    }

    fn memory(&mut self) -> Memory {
        let peak = self.peak.so_far();
        Memory {
            own_bytes: peak.map(|peak| peak.own),
            mapped_bytes: peak.map(|peak| peak.mapped),
            ..host::read()
        }
    }

    fn generate(&mut self, model: &Model, prompt: &str) -> Result<String, String> {
        let sampler = self.sampler.as_ref().ok_or("there is no tokenizer")?;
        let text = sampler.text(model, prompt);
        text.map_err(|error| format!("{error:#}"))
    }

    fn score(&mut self, step: u64, model: &Model) -> Result<Vec<TaskScore>, String> {
        let scorer = self.scorer.as_ref().ok_or("there are no tasks")?;
        let scores = scorer.score(step, model);
        scores.map_err(|error| format!("{error:#}"))
    }
}

impl Watcher {
    pub(super) fn new(
        session: &Session,
        (tasks, run): (Option<RecipeTasks>, &RunDir),
        signals: Signals,
        console: &Console,
    ) -> anyhow::Result<Self> {
        let progress = console.progress(session.total_steps(), "training");
        let below = || console.below(&progress);
        let scorer = tasks.map(|tasks| TaskScorer::new(tasks, session, run, below()));
        Ok(Self {
            scorer: scorer.transpose()?,
            progress,
            validation: None,
            signals,
            sampler: PromptSampler::new(session)?,
            smoothed: None,
            seconds: 0.0,
            tokens: 0,
            saved_activation_bytes: 0,
            step_memory: StepMemory::default(),
            peak: ResidentPeak::watch(),
            energy: EnergyMeter::start(&Machine::here()).ok(),
        })
    }

    /// Removes the progress bar. Returns what asks tasks, the maximum bytes of saved activations, and the memory of the run if the
    /// system tells.
    pub(super) fn finish(mut self) -> (Option<TaskScorer>, usize, Option<MeasuredMemory>) {
        if let Some(progress) = self.validation {
            progress.finish();
        }
        let joules = self.energy.as_mut().map(EnergyMeter::joules);
        if let Some(joules) = joules.filter(|_| self.tokens > 0) {
            let of_token = joules / self.tokens as f64;
            self.progress.line(&format!(
                "energy: {of_token:.3} J/token, validation included"
            ));
        }
        self.progress.finish();
        let measured = self.peak.so_far().map(|resident| MeasuredMemory {
            resident,
            step: self.step_memory,
        });
        (self.scorer, self.saved_activation_bytes, measured)
    }

    fn validating(&mut self, done: &ValidationProgress) {
        let training = &self.progress;
        let start = || training.part(done.total, "validating");
        let rate = done.tokens as f64 / done.seconds.max(1e-9);
        let progress = self.validation.get_or_insert_with(start);
        progress.update(done.batches, &format!("{rate:.0} tokens/s"));
    }

    fn step(&mut self, report: &StepReport) {
        // An exponential average over about 20 steps: single steps are too noisy to read.
        let smoothed = self
            .smoothed
            .map_or(report.loss, |old| old + 0.05 * (report.loss - old));
        self.smoothed = Some(smoothed);
        if let Some(energy) = &mut self.energy {
            // Its counters start again after some time.
            energy.joules();
        }
        self.seconds += report.seconds;
        self.tokens += report.tokens;
        self.saved_activation_bytes = self
            .saved_activation_bytes
            .max(report.saved_activation_bytes);
        if report.memory.step >= self.step_memory.step {
            self.step_memory = report.memory;
        }
        let rate = self.tokens as f64 / self.seconds.max(1e-9);
        self.progress.update(
            report.step,
            &format!(
                "loss {smoothed:.4} lr {:.1e} {rate:.0} tokens/s{}",
                report.learning_rate,
                memory_held()
            ),
        );
    }
}

/// A score as a line.
fn line_of(step: u64, score: &TaskScore) -> String {
    let TaskScore {
        task,
        metric,
        filter,
        value,
        standard_error,
        ..
    } = score;
    let error = standard_error.map_or_else(String::new, |error| format!(" ± {error:.4}"));
    let filter = match filter.as_str() {
        "none" => String::new(),
        filter => format!(",{filter}"),
    };
    format!("step {step}: {task} {metric}{filter} {value:.4}{error}")
}

/// What a validation loss says to a person.
fn meaning_of(loss: f64, rewards: Option<Rewards>) -> String {
    let Some(rewards) = rewards else {
        return format!("perplexity {:.2}", loss.exp());
    };
    format!(
        "reward margin {:.4}, {:.1} % of pairs ranked correctly",
        rewards.margin,
        100.0 * rewards.accuracy
    )
}

/// The program's memory besides mapped files, for the progress line; empty if the operating system does not tell.
fn memory_held() -> String {
    Resident::own().map_or_else(String::new, |held| format!(" {} MiB", held.own >> 20))
}
