//! What a run shows on the terminal, and what it learns from the machine.

use model::Model;
use train::{Event, Host, Memory, SampledText, Session, StepReport};

use super::memory;
use super::samples::Sampler;
use super::signals::Signals;
use crate::console::{self, Console, Progress};

/// Shows a run's progress, and tells the run of signals and of memory.
#[derive(Debug)]
pub(super) struct Watcher {
    progress: Progress,
    signals: Signals,
    sampler: Option<Sampler>,
    smoothed: Option<f64>,
    seconds: f64,
    tokens: usize,
    saved_activation_bytes: usize,
}

impl Host for Watcher {
    fn see(&mut self, event: &Event) {
        match event {
            Event::Step(report) => self.step(report),
            Event::FirstGradient(audit) => self.progress.line(&audit.summary()),
            Event::Validated {
                step,
                loss,
                rewards,
                drift,
            } => {
                let drift = drift.map_or_else(String::new, |drift| {
                    format!(
                        ", {:.1} % of routing changed",
                        100.0 * drift
                    )
                });
                let meaning = rewards.map_or_else(
                    || format!("perplexity {:.2}", loss.exp()),
                    |rewards| {
                        format!(
                            "margin {:.4}, {:.1} % of pairs in the right order",
                            rewards.margin,
                            100.0 * rewards.accuracy
                        )
                    },
                );
                self.progress.line(&format!(
                    "step {step}: validation loss {loss:.4}, {meaning}{drift}"
                ));
            }
            Event::Overflowed { step, loss_scale } => self.progress.line(&format!(
                "step {step}: gradients overflowed; repeating with a loss scale of {loss_scale}"
            )),
            Event::RolledBack {
                step,
                loss,
                smoothed,
                to,
            } => self.progress.line(&format!(
                "step {step}: loss {loss:.4} after {smoothed:.4} on average; going back to step {to} and \
                 skipping the batches of the spike"
            )),
            Event::Sampled { step, samples } => {
                for SampledText { prompt, text } in samples {
                    let line = format!("step {step}: {prompt} → {text}");
                    self.progress.line(&console::printable(&line, &[]));
                }
            }
            Event::RestoredBest { step, loss } => self.progress.line(&format!(
                "step {step} had the lowest validation loss, {loss:.4}, and is the result"
            )),
            Event::Saved { .. } => {}
        }
    }

    fn interrupted(&mut self) -> Option<i32> {
        self.signals.received()
    }

    fn memory(&mut self) -> Memory {
        memory::read()
    }

    fn generate(&mut self, model: &Model, prompt: &str) -> Result<String, String> {
        let sampler = self.sampler.as_ref().ok_or("there is no tokenizer")?;
        let text = sampler.text(model, prompt);
        text.map_err(|error| format!("{error:#}"))
    }
}

impl Watcher {
    pub(super) fn new(
        session: &Session,
        signals: Signals,
        console: &Console,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            progress: console.progress(session.total_steps(), "training"),
            signals,
            sampler: Sampler::new(session)?,
            smoothed: None,
            seconds: 0.0,
            tokens: 0,
            saved_activation_bytes: 0,
        })
    }

    /// Removes the progress bar. Returns the most bytes that waited for a backward pass.
    pub(super) fn finish(self) -> usize {
        self.progress.finish();
        self.saved_activation_bytes
    }

    fn step(&mut self, report: &StepReport) {
        // An exponential average over about 20 steps: single steps are too noisy to read.
        let smoothed = self
            .smoothed
            .map_or(report.loss, |old| old + 0.05 * (report.loss - old));
        self.smoothed = Some(smoothed);
        self.seconds += report.seconds;
        self.tokens += report.tokens;
        self.saved_activation_bytes = self
            .saved_activation_bytes
            .max(report.saved_activation_bytes);
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

/// What the program holds besides mapped files, for the progress line; nothing where the operating system does not tell.
fn memory_held() -> String {
    let held = console::resident_bytes(std::process::id());
    held.map_or_else(String::new, |[_, own]| format!(" {} MiB", own >> 20))
}
