//! What a step takes of memory, as the allocator counts it.

use kernels::{AllocatedBytes, allocated_bytes};
use serde::Serialize;

/// Bytes in blocks of 64 KiB or more; zeros in a program that does not count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StepMemory {
    /// In use after the step: weights, adapters and moments.
    pub resting: usize,
    /// What a forward pass leaves for the backward pass, of the micro-batches that need most.
    pub saved: usize,
    /// The most that the step takes, besides what was in use before.
    pub step: usize,
}

/// Reads the phases of a step.
#[derive(Debug)]
pub(super) struct StepTally {
    memory: StepMemory,
    /// In use before the pass.
    before: usize,
}

impl StepTally {
    /// Before the first pass.
    pub(super) fn begin() -> Self {
        let before = allocated_bytes().now;
        let memory = StepMemory {
            resting: before,
            ..StepMemory::default()
        };
        Self { memory, before }
    }

    /// Before a pass.
    pub(super) fn begin_pass(&mut self) {
        self.before = self.read();
    }

    /// Between the forward and the backward pass.
    pub(super) fn end_forward(&mut self) {
        let saved = self.read().saturating_sub(self.before);
        self.memory.saved = self.memory.saved.max(saved);
    }

    /// After the update.
    pub(super) fn end(mut self) -> StepMemory {
        let resting = self.read();
        StepMemory {
            resting,
            ..self.memory
        }
    }

    /// The bytes in use.
    fn read(&mut self) -> usize {
        let AllocatedBytes { now, peak } = allocated_bytes();
        let of_step = peak.saturating_sub(self.memory.resting);
        self.memory.step = self.memory.step.max(of_step);
        now
    }
}
