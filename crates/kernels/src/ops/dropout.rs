//! Dropout whose mask is a function of a seed and an element's index.
//!
//! Nothing is stored: a backward pass, a recomputed block or a resumed run makes the same mask again from the same
//! seed, whatever the number of threads.

/// Which elements are dropped, and how the rest is scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability of dropping an element, in [0, 1).
    pub probability: f32,
    /// The seed of the mask; different for every module and step.
    pub seed: u64,
}

impl Dropout {
    /// No dropout.
    pub const OFF: Self = Self {
        probability: 0.0,
        seed: 0,
    };

    /// Whether nothing is dropped.
    pub fn is_off(&self) -> bool {
        self.probability == 0.0
    }

    /// The same probability with a seed of its own.
    #[must_use]
    pub fn fork(&self, site: u64) -> Self {
        Self {
            seed: mix(self.seed ^ mix(site.wrapping_add(1))),
            ..*self
        }
    }

    /// Drops elements of `values`, the first of which has index `first`.
    pub(crate) fn apply(&self, values: &mut [f32], first: u64) {
        if self.is_off() {
            return;
        }
        let (limit, keep) = (
            (f64::from(self.probability) * 2f64.powi(32)) as u64,
            1.0 / (1.0 - self.probability),
        );
        for (index, value) in (first..).zip(values) {
            let dropped = mix(self
                .seed
                .wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
                >> 32
                < limit;
            *value = if dropped { 0.0 } else { *value * keep };
        }
    }
}

/// The finalizer of SplitMix64: every input bit reaches every output bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_replayed_in_any_cut_and_keeps_the_mean() {
        let dropout = Dropout {
            probability: 0.25,
            seed: 7,
        }
        .fork(3);
        let mut whole = vec![1.0; 40_000];
        dropout.apply(&mut whole, 0);
        let mut tail = vec![1.0; 39_990];
        dropout.apply(&mut tail, 10);
        assert_eq!(whole[10..], tail);
        let mean = whole.iter().sum::<f32>() / 40_000.0;
        // Standard deviation of the mean: sqrt(0.25 / 0.75 / 40,000) = 0.003.
        assert!((mean - 1.0).abs() < 0.012, "{mean}");
        let mut other = vec![1.0; 40_000];
        dropout.fork(0).apply(&mut other, 0);
        assert_ne!(whole, other);
    }
}
