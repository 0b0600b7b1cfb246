//! The dynamic scale of the loss in f16 training.
//!
//! Gradients are often smaller than f16 can represent, so the loss is multiplied before the backward pass and the gradients
//! are divided after it. The scale is a power of two, so neither rounds. It halves when a gradient overflows, and doubles
//! after a number of steps without overflow.
//!
//! Source: Mixed precision training, arXiv:1710.03740, section 3.2.

use model::OperandRounding;
use serde::{Deserialize, Serialize};

use crate::recipe::{MAX_LOSS_SCALE_EXPONENT, PrecisionSection};

/// The loss scale of a run in f16, and its age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// The scale is two to the power of this.
    pub exponent: u32,
    /// Steps since it changed.
    pub clean_steps: u64,
}

impl LossScale {
    /// A recipe's scale at the start; none if the precision needs none.
    pub(crate) fn new(precision: &PrecisionSection) -> Option<Self> {
        (precision.compute == OperandRounding::F16).then(|| Self {
            exponent: precision.loss_scale.log2() as u32,
            clean_steps: 0,
        })
    }

    /// The factor of the loss.
    pub(crate) fn factor(self) -> f64 {
        2f64.powi(self.exponent as i32)
    }

    /// After an overflow: half the scale, or none if there is nothing left to halve.
    pub(crate) fn halved(self) -> Option<Self> {
        Some(Self {
            exponent: self.exponent.checked_sub(1)?,
            clean_steps: 0,
        })
    }

    /// After a step without overflow.
    pub(crate) fn after_clean_step(self, growth_interval: u64) -> Self {
        let clean_steps = self.clean_steps.saturating_add(1);
        if clean_steps < growth_interval {
            return Self {
                clean_steps,
                ..self
            };
        }
        Self {
            exponent: (self.exponent + 1).min(MAX_LOSS_SCALE_EXPONENT),
            clean_steps: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_at_once_and_doubles_after_an_interval() {
        let start = LossScale {
            exponent: 3,
            clean_steps: 0,
        };
        let half = start.halved().unwrap();
        assert_eq!((half.factor(), half.clean_steps), (4.0, 0));
        let mut scale = half;
        for _ in 0..2 {
            scale = scale.after_clean_step(3);
            assert_eq!(scale.factor(), 4.0);
        }
        assert_eq!(scale.after_clean_step(3), start);
        let none_left = (0..4).try_fold(start, |scale, _| scale.halved());
        assert_eq!(none_left, None);
        let largest = LossScale {
            exponent: MAX_LOSS_SCALE_EXPONENT,
            clean_steps: 0,
        };
        assert_eq!(largest.after_clean_step(1), largest);
    }

    #[test]
    fn only_f16_has_one() {
        let mut precision = PrecisionSection::default();
        assert_eq!(LossScale::new(&precision), None);
        precision.compute = OperandRounding::F16;
        precision.loss_scale = 1024.0;
        let scale = LossScale::new(&precision).unwrap();
        assert_eq!(scale.factor(), 1024.0);
    }
}
