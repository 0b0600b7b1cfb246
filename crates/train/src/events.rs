//! What a run tells whoever started it, and what it asks of them: all that a library cannot know by itself.

use model::Model;

use crate::fit::Event;

/// The program around a run. A closure over events is one that has nothing to add.
pub trait Host {
    /// Is told what happened.
    fn see(&mut self, event: &Event);

    /// The number of a signal that asks the run to save and stop. Asked after every step.
    fn interrupted(&mut self) -> Option<i32> {
        None
    }

    /// What memory there is. Asked after every step.
    fn memory(&mut self) -> Memory {
        Memory::default()
    }

    /// Continues one of the recipe's prompts with a model that has no gradients.
    ///
    /// # Errors
    /// If it cannot: what is wrong.
    fn generate(&mut self, _model: &Model, _prompt: &str) -> Result<String, String> {
        Err("this program writes no samples".to_owned())
    }
}

/// The machine's memory and the program's, where the operating system tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What new allocations could still get without swapping.
    pub available_bytes: Option<u64>,
    /// The most that this program held at once, mapped files included.
    pub peak_bytes: Option<u64>,
}

impl Memory {
    /// A run saves and stops when less than this is left. Linux ends programs at about nothing, and a checkpoint, whose
    /// tensors are written one at a time, needs a small part of it.
    pub const LEAST_AVAILABLE_BYTES: u64 = 128 << 20;

    /// What is left, if it is too little.
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
