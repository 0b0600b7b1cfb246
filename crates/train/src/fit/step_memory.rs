//! What a step takes of memory, phase by phase, as the allocator counts it.

use kernels::{AllocatedBytes, allocated_bytes};
use serde::Serialize;

/// Bytes in blocks of 64 KiB or more; zeros in a program that does not count them. Those of a pass are of the micro-batches
/// that needed most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StepMemory {
    /// In use after the step: weights, adapters and moments.
    pub resting: usize,
    /// What a forward pass leaves for the backward pass.
    pub saved: usize,
    /// The most that a forward pass takes.
    pub forward: usize,
    /// The most that a forward and a backward pass take.
    pub pass: usize,
    /// The gradients that a backward pass leaves.
    pub gradients: usize,
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
        let AllocatedBytes { now, .. } = allocated_bytes();
        let memory = StepMemory {
            resting: now,
            ..StepMemory::default()
        };
        Self {
            memory,
            before: now,
        }
    }

    /// Before a pass.
    pub(super) fn begin_pass(&mut self) {
        self.before = self.read().now;
    }

    /// Between the forward and the backward pass.
    pub(super) fn end_forward(&mut self) {
        let AllocatedBytes { now, peak } = self.read();
        let of_pass = |bytes: usize| bytes.saturating_sub(self.before);
        self.memory.saved = self.memory.saved.max(of_pass(now));
        self.memory.forward = self.memory.forward.max(of_pass(peak));
    }

    /// After the backward pass.
    pub(super) fn end_pass(&mut self) {
        let AllocatedBytes { now, peak } = self.read();
        let of_pass = |bytes: usize| bytes.saturating_sub(self.before);
        self.memory.gradients = self.memory.gradients.max(of_pass(now));
        self.memory.pass = self.memory.pass.max(of_pass(peak)).max(self.memory.forward);
    }

    /// After the update.
    pub(super) fn end(mut self) -> StepMemory {
        let AllocatedBytes { now, .. } = self.read();
        StepMemory {
            resting: now,
            ..self.memory
        }
    }

    fn read(&mut self) -> AllocatedBytes {
        let read = allocated_bytes();
        let of_step = read.peak.saturating_sub(self.memory.resting);
        self.memory.step = self.memory.step.max(of_step);
        read
    }
}
