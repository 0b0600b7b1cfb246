//! From logits to a token.
//!
//! Temperature divides the logits before the softmax; then the least likely tokens are left out until only the
//! smallest set with mass of at least `top_p` remains; then one of them is drawn. Arithmetic is f64, so that the masses
//! of 129,280 tokens add up.
//!
//! Source: nucleus sampling, arXiv:1904.09751, section 3.1.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleConfig {
    /// Divides the logits. 0 always takes the likeliest token, of equals the one with the lower id.
    pub temperature: f32,
    /// Mass of the likeliest tokens that are drawn from; 1 for all.
    pub top_p: f32,
    /// Where the random numbers start.
    pub seed: u64,
}

/// Chooses tokens, one after the other.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SampleConfig,
    random: ChaCha8Rng,
}

/// A token that may be drawn, and its share before it is divided by the sum of all.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    mass: f64,
}

impl Sampler {
    /// A sampler at the start of its seed's random numbers.
    ///
    /// # Errors
    /// If the temperature is not a number from 0 up, or `top_p` is not above 0 and at most 1.
    pub fn new(config: SampleConfig) -> Result<Self> {
        let wrong = |name, expected, found| Error::Setting {
            name,
            expected,
            found,
        };
        if !(config.temperature >= 0.0 && config.temperature.is_finite()) {
            let expected = "a number from 0 up";
            return Err(wrong("temperature", expected, config.temperature));
        }
        if !(config.top_p > 0.0 && config.top_p <= 1.0) {
            let expected = "a number above 0 and at most 1";
            return Err(wrong("top_p", expected, config.top_p));
        }
        Ok(Self {
            config,
            random: ChaCha8Rng::seed_from_u64(config.seed),
        })
    }

    /// The id of the next token; `None` if a logit is NaN or positive infinity, or all are negative infinity.
    ///
    /// # Shapes
    /// - `logits`: `[vocab]`
    pub fn sample(&mut self, logits: &[f32]) -> Option<u32> {
        let likeliest = likeliest(logits)?;
        if self.config.temperature == 0.0 {
            return Some(likeliest as u32);
        }
        let (largest, temperature) = (
            f64::from(logits[likeliest]),
            f64::from(self.config.temperature),
        );
        let candidates = (0..).zip(logits).map(|(id, logit)| Candidate {
            id,
            mass: ((f64::from(*logit) - largest) / temperature).exp(),
        });
        let candidates = nucleus(candidates.collect(), f64::from(self.config.top_p));
        Some(self.draw(&candidates))
    }

    /// One of the candidates, each as often as its mass says.
    fn draw(&mut self, candidates: &[Candidate]) -> u32 {
        let total: f64 = candidates.iter().map(|candidate| candidate.mass).sum();
        // 53 random bits: all that a number below 1 holds.
        let mut left = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let mut drawn = 0;
        for candidate in candidates.iter().filter(|candidate| candidate.mass > 0.0) {
            drawn = candidate.id;
            left -= candidate.mass;
            if left < 0.0 {
                break;
            }
        }
        drawn
    }
}

/// The first of the largest logits.
fn likeliest(logits: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if *logit > logits[best] {
            best = id;
        }
    }
    logits.get(best)?.is_finite().then_some(best)
}

/// The smallest set with at least a share `top_p` of the mass, the likeliest first; of equals the lower id first.
fn nucleus(mut candidates: Vec<Candidate>, top_p: f64) -> Vec<Candidate> {
    if top_p >= 1.0 {
        return candidates;
    }
    let total: f64 = candidates.iter().map(|candidate| candidate.mass).sum();
    // What lies below this line adds up to less than `1 − top_p` and is never kept. Most tokens do, and need no sorting.
    let least = (1.0 - top_p) * total / candidates.len() as f64;
    candidates.retain(|candidate| candidate.mass >= least);
    candidates.sort_unstable_by(|a, b| b.mass.total_cmp(&a.mass).then(a.id.cmp(&b.id)));

    let mut mass = 0.0;
    let reaches = |candidate: &Candidate| {
        mass += candidate.mass;
        mass >= top_p * total
    };
    let kept = candidates.iter().position(reaches);
    candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(SampleConfig {
            temperature,
            top_p,
            seed,
        })
        .unwrap()
    }

    #[test]
    fn temperature_zero_takes_the_largest_and_of_equals_the_first() {
        let inf = f32::INFINITY;
        for (logits, expected) in [
            (&[1.0, 3.0, 2.0][..], Some(1)),
            (&[3.0, 1.0, 3.0], Some(0)),
            (&[-5.0], Some(0)),
            (&[-inf, -2.0, -inf], Some(1)),
            (&[0.0, f32::NAN], None),
            (&[f32::NAN, 0.0], None),
            (&[0.0, inf], None),
            (&[-inf, -inf], None),
            (&[], None),
        ] {
            assert_eq!(sampler(0.0, 1.0, 0).sample(logits), expected, "{logits:?}");
            if expected.is_none() {
                assert_eq!(sampler(1.0, 0.9, 0).sample(logits), None, "{logits:?}");
            }
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let masses = [0.1, 0.4, 0.05, 0.3, 0.15];
        for (top_p, expected) in [
            (1e-6, &[1][..]),
            (0.39, &[1]),
            (0.41, &[1, 3]),
            (0.69, &[1, 3]),
            (0.71, &[1, 3, 4]),
            (0.84, &[1, 3, 4]),
            (0.94, &[1, 3, 4, 0]),
            (0.96, &[1, 3, 4, 0, 2]),
            (1.0, &[0, 1, 2, 3, 4]),
        ] {
            // Masses need not add up to one.
            let candidates = (0..).zip(masses.map(|mass| 7.0 * mass));
            let candidates = candidates.map(|(id, mass)| Candidate { id, mass });
            let kept: Vec<u32> = nucleus(candidates.collect(), top_p)
                .iter()
                .map(|candidate| candidate.id)
                .collect();
            assert_eq!(kept, expected, "{top_p}");
        }
        let equals = [5, 2, 9].map(|id| Candidate { id, mass: 1.0 });
        let kept = nucleus(equals.to_vec(), 0.5);
        assert_eq!(kept.iter().map(|c| c.id).collect::<Vec<_>>(), [2, 5]);
    }

    #[test]
    fn a_seed_gives_the_same_tokens_again() {
        let logits: Vec<f32> = (0..50).map(|id| (id as f32 * 0.7).sin()).collect();
        let tokens = |seed| {
            let mut sampler = sampler(1.0, 0.95, seed);
            (0..40)
                .map(|_| sampler.sample(&logits).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(tokens(7), tokens(7));
        assert_ne!(tokens(7), tokens(8));
    }

    #[test]
    fn tokens_are_drawn_as_often_as_the_softmax_says() {
        const DRAWS: usize = 20_000;
        let logits = [0.0, 1.0, -1.5, 2.0, f32::NEG_INFINITY, 0.5];
        for (temperature, top_p) in [(1.0, 1.0), (0.6, 1.0), (2.0, 1.0), (1.0, 0.8)] {
            // The softmax, and for the last row without what lies outside of the nucleus: 3, 1 and 5 have 0.88.
            let inside = |id: usize| top_p == 1.0 || [3, 1, 5].contains(&id);
            let mass = |id: usize| f64::from(logits[id] / temperature).exp();
            let total: f64 = (0..6).filter(|id| inside(*id)).map(mass).sum();
            let mut counts = [0usize; 6];
            let mut sampler = sampler(temperature, top_p, 3);
            for _ in 0..DRAWS {
                counts[sampler.sample(&logits).unwrap() as usize] += 1;
            }
            for (id, count) in counts.into_iter().enumerate() {
                let expected = if inside(id) { mass(id) / total } else { 0.0 };
                let standard_error = (expected * (1.0 - expected) / DRAWS as f64).sqrt();
                let found = count as f64 / DRAWS as f64;
                assert!(
                    (found - expected).abs() <= 4.0 * standard_error,
                    "temperature {temperature}, top-p {top_p}, token {id}: {found}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn settings_without_a_meaning_are_refused() {
        for (temperature, top_p, expected) in [
            (
                -1.0,
                1.0,
                "`temperature`: expected a number from 0 up, found -1",
            ),
            (
                f32::NAN,
                1.0,
                "`temperature`: expected a number from 0 up, found NaN",
            ),
            (
                1.0,
                0.0,
                "`top_p`: expected a number above 0 and at most 1, found 0",
            ),
            (
                1.0,
                1.5,
                "`top_p`: expected a number above 0 and at most 1, found 1.5",
            ),
        ] {
            let config = SampleConfig {
                temperature,
                top_p,
                seed: 0,
            };
            assert_eq!(Sampler::new(config).unwrap_err().to_string(), expected);
        }
    }
}
