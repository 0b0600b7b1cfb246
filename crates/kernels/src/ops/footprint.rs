//! The memory that operations take besides their operands and results, predicted from shapes alone.
//!
//! Bytes are f64: no shape makes them overflow, and they are exact up to 2^53.

use super::experts::{GROUP_TASKS, TASK_SLOTS};
use super::loss::vocab_parts;
use crate::settings::Compute;

/// Bytes of an f32.
const BYTES_OF_F32: f64 = 4.0;

/// Bytes of an element of an activation that is saved for the backward pass.
pub fn saved_element_bytes(compute: Compute) -> f64 {
    match compute {
        Compute::F32 | Compute::MatchWeight => BYTES_OF_F32,
        Compute::Bf16 | Compute::F16 => 2.0,
        // A code, and a scale for each tile of 1 × 128.
        Compute::Fp8(_) => 1.0 + BYTES_OF_F32 / 128.0,
    }
}

/// The sizes of a layer of experts and of its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsShape {
    /// Tokens, each with `top_k` experts.
    pub tokens: f64,
    /// Experts of a token.
    pub top_k: f64,
    /// Experts.
    pub experts: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Inner width of an expert.
    pub inner: f64,
}

impl ExpertsShape {
    /// Pairs of a token and one of its experts.
    pub fn slots(&self) -> f64 {
        self.tokens * self.top_k
    }

    /// The slots of the largest group of experts that take turns, if they are chosen evenly.
    fn group_slots(&self, threads: f64) -> f64 {
        let most = (GROUP_TASKS * TASK_SLOTS) as f64 * threads;
        let of_expert = self.slots() / self.experts.max(1.0);
        self.slots().min(most.max(of_expert))
    }

    /// The slots of a thread's task.
    fn task_slots(&self) -> f64 {
        (TASK_SLOTS as f64).min(self.slots())
    }

    /// What threads keep of a forward pass: the output rows of a group, and the rows of each thread's task.
    pub fn forward_scratch(&self, threads: f64) -> f64 {
        let of_thread = self.task_slots() * (self.hidden + self.inner);
        BYTES_OF_F32 * (self.group_slots(threads) * self.hidden + threads * of_thread)
    }

    /// What threads keep of a backward pass: a group's gradients, and the rows of an expert in each thread.
    pub fn backward_scratch(&self, threads: f64) -> f64 {
        let of_group = self.group_slots(threads) * (3.0 * self.inner + self.hidden + 1.0);
        let of_expert = self.slots() / self.experts.max(1.0) * self.hidden;
        BYTES_OF_F32 * (of_group + threads * of_expert)
    }
}

/// What each thread keeps for products, scores and logits.
pub const THREAD_SCRATCH: f64 = 3.0 * (1 << 20) as f64;

/// The sizes of an output head and of its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadShape {
    /// Tokens with a target.
    pub tokens: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Tokens of the vocabulary.
    pub vocab: f64,
}

impl HeadShape {
    fn gathered(&self) -> f64 {
        BYTES_OF_F32 * self.tokens * self.hidden
    }

    /// What the loss of a frozen head without an update takes, whose gradient by its input comes with it: the trained tokens, a
    /// sum for each of them and each part of the vocabulary, and the gradients.
    pub fn fused_loss_bytes(&self) -> f64 {
        let parts = vocab_parts(self.tokens as usize, self.vocab as usize).1 as f64;
        self.gathered() * (2.0 + parts)
    }

    /// What the loss alone takes: the trained tokens.
    pub fn loss_bytes(&self) -> f64 {
        self.gathered()
    }

    /// What the backward pass takes besides the gradients of the weights: the trained tokens and their gradients.
    pub fn backward_bytes(&self) -> f64 {
        2.0 * self.gathered()
    }
}
