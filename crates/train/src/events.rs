//! The interface between a run and the program around it: events that the run reports, and questions that it asks.

use std::path::PathBuf;

use model::Model;
use serde::{Deserialize, Serialize};

use crate::dpo::Rewards;
use crate::fit::grad_audit::GradAudit;
use crate::fit::step_memory::StepMemory;

/// Something that happened in a run.
#[derive(Clone, Debug)]
pub enum Event {
    /// An update was made.
    Step(StepReport),
    /// The gradient of the first step was audited.
    FirstGradient(GradAudit),
    /// A batch of a validation pass was measured.
    Validating(ValidationProgress),
    /// The validation loss was measured.
    Validated {
        /// After which step.
        step: u64,
        /// Mean nats per trained token, or per pair.
        loss: f64,
        /// Means over the pairs, if preferences are learned.
        rewards: Option<Rewards>,
        /// Share of the routing choices that differ from the reference's, if there are both.
        drift: Option<f64>,
    },
    /// Gradients overflowed in f16; the step is repeated with this loss scale.
    Overflowed {
        /// Which step.
        step: u64,
        /// Half of the previous one.
        loss_scale: f64,
    },
    /// The model continued the recipe's prompts.
    Sampled {
        /// After which step.
        step: u64,
        /// In the recipe's order.
        samples: Vec<SampledText>,
    },
    /// The model was asked the recipe's tasks.
    Scored {
        /// After which step.
        step: u64,
        /// One for each metric of each task.
        scores: Vec<TaskScore>,
    },
    /// The loss diverged, and the run went back.
    RolledBack {
        /// From which step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// The average before the spike.
        smoothed: f64,
        /// The step after which the run continues.
        to: u64,
    },
    /// The run is over, and its result is that of this earlier step.
    RestoredBest {
        /// The best step.
        step: u64,
        /// What it is best in: `validation loss`, or the names of a task and a metric.
        measure: String,
        /// That number.
        value: f64,
    },
    /// A finished run goes on, and its result has another name.
    SetAside {
        /// The step of the result.
        step: u64,
        /// Its new path.
        path: PathBuf,
    },
    /// A checkpoint was written.
    Saved {
        /// After which step.
        step: u64,
    },
}

/// How far a validation pass is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValidationProgress {
    /// Batches measured, of the trained model and of the reference for its routing.
    pub batches: u64,
    /// Batches of the whole pass.
    pub total: u64,
    /// Tokens measured, without padding.
    pub tokens: u64,
    /// Seconds since the pass began.
    pub seconds: f64,
}

/// A prompt and the model's continuation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampledText {
    /// The prompt.
    pub prompt: String,
    /// The continuation.
    pub text: String,
}

/// A metric of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// The task.
    pub task: String,
    /// The metric.
    pub metric: String,
    /// The filter of answers.
    pub filter: String,
    /// Whether more is better.
    pub is_higher_better: bool,
    /// The number.
    pub value: f64,
    /// Its standard error, if it has one.
    pub standard_error: Option<f64>,
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
    /// Tokens of the step without padding.
    pub tokens: usize,
    /// Tokens that were targets.
    pub trained_tokens: usize,
    /// Sum over layers of the balance loss, if it is part of the loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_loss: Option<f64>,
    /// The factor of the loss before it was differentiated, in f16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Peak size of the activations saved for the backward pass by linear layers, SwiGLU and experts.
    pub saved_activation_bytes: usize,
    /// What the step took of memory.
    #[serde(skip)]
    pub memory: StepMemory,
    /// Wall time of the step.
    pub seconds: f64,
}

/// The program around a run. A closure over events is one that adds nothing else.
pub trait Host {
    /// Receives an event.
    fn see(&mut self, event: &Event);

    /// The number of a signal that asks the run to save and stop. The run calls this after every step, and before every
    /// batch of a validation pass.
    fn interrupted(&mut self) -> Option<i32> {
        None
    }

    /// The memory of the machine and of the program. The run calls this when it calls [`Host::interrupted`].
    fn memory(&mut self) -> Memory {
        Memory::default()
    }

    /// Continues one of the recipe's prompts with a model that has no gradients.
    ///
    /// # Errors
    /// If it cannot: the reason.
    fn generate(&mut self, _model: &Model, _prompt: &str) -> Result<String, String> {
        Err("this program writes no samples".to_owned())
    }

    /// Asks a model that has no gradients the recipe's tasks, after a step.
    ///
    /// # Errors
    /// If it cannot: the reason.
    fn score(&mut self, _step: u64, _model: &Model) -> Result<Vec<TaskScore>, String> {
        Err("this program has no tasks".to_owned())
    }
}

/// The machine's memory and the program's, as far as the operating system tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that new allocations could still get without swapping.
    pub available_bytes: Option<u64>,
    /// Peak resident size of this program, mapped files included.
    pub peak_bytes: Option<u64>,
    /// Peak size of its own memory.
    pub own_bytes: Option<u64>,
    /// Peak size of mapped files in memory.
    pub mapped_bytes: Option<u64>,
}

impl Memory {
    /// A run saves and stops when less than this is left. Linux kills programs at about nothing, and a checkpoint, whose
    /// tensors are written one at a time, needs a small part of it.
    pub const LEAST_AVAILABLE_BYTES: u64 = 128 << 20;

    /// The available bytes, if they are too few.
    pub(crate) fn shortage(self) -> Option<u64> {
        self.available_bytes
            .filter(|bytes| *bytes < Self::LEAST_AVAILABLE_BYTES)
    }
}

impl<F: FnMut(&Event)> Host for F {
    fn see(&mut self, event: &Event) {
        self(event);
    }
}
