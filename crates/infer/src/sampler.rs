//! From logits to a token, in steps that each may be switched off:
//!
//! 1. *Repetition penalty*: logits of tokens that the text already has are divided by it where they are positive, and
//!    multiplied with it where they are negative.
//! 2. *Temperature* divides the logits before the softmax.
//! 3. *Top-k* keeps the `k` likeliest tokens.
//! 4. *Top-p* keeps the smallest set of the likeliest with mass of at least `top_p`, of what top-k left.
//! 5. *Min-p* keeps tokens at least `min_p` times as likely as the likeliest.
//! 6. One of those left is drawn.
//!
//! That is the order of Hugging Face's transformers, for which publishers choose the values in `generation_config.json`.
//! llama.cpp applies the temperature last: with one below 1 it then draws from more tokens at the same `top_p`. Arithmetic
//! is f64, so that the masses of 129,280 tokens add up.
//!
//! Source: repetition penalty, arXiv:1909.05858, section 4.1; top-p, arXiv:1904.09751, section 3.1; min-p,
//! arXiv:2407.01082, section 3.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleConfig {
    /// Divides the logits. 0 always takes the likeliest token, of equals the one with the lower id.
    pub temperature: f32,
    /// How many of the likeliest tokens are drawn from; 0 for all.
    pub top_k: usize,
    /// Mass of the likeliest tokens that are drawn from; 1 for all.
    pub top_p: f32,
    /// How likely a token has to be beside the likeliest; 0 for all.
    pub min_p: f32,
    /// What tokens that were there before are made less likely by; 1 for nothing.
    pub repetition_penalty: f32,
    /// How many of the last tokens, those of the prompt included, count as having been there; 0 for all.
    pub repetition_window: usize,
    /// Where the random numbers start.
    pub seed: u64,
}

impl SampleConfig {
    /// Always the likeliest token.
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 0,
            seed: 0,
        }
    }

    /// # Errors
    /// If a setting has no meaning.
    fn check(&self) -> Result<()> {
        let non_negative = |value: f32| value >= 0.0 && value.is_finite();
        let settings = [
            (
                "temperature",
                self.temperature,
                non_negative(self.temperature),
                "a number from 0 up",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "a number above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "a number from 0 to 1",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
                "a number above 0",
            ),
        ];
        match settings
            .into_iter()
            .find(|(.., has_meaning, _)| !has_meaning)
        {
            None => Ok(()),
            Some((name, found, _, expected)) => Err(Error::Setting {
                name,
                expected,
                found,
            }),
        }
    }
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
    /// If a setting has no meaning: a temperature, min-p or penalty below 0, a top-p of 0, a probability above 1.
    pub fn new(config: SampleConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            config,
            random: ChaCha8Rng::seed_from_u64(config.seed),
        })
    }

    /// The id of the next token after some text; `None` if a logit is NaN or positive infinity, or all are negative infinity.
    ///
    /// # Shapes
    /// - `logits`: `[vocab]`
    pub fn sample(&mut self, logits: &[f32], text: &[u32]) -> Option<u32> {
        let best = argmax(logits)?;
        if self.config.repetition_penalty == 1.0 {
            return Some(self.choose(logits, best));
        }
        let window = match self.config.repetition_window {
            0 => text,
            n => &text[text.len().saturating_sub(n)..],
        };
        let logits = penalized(logits, window, self.config.repetition_penalty);
        let best = argmax(&logits)?;
        Some(self.choose(&logits, best))
    }

    fn choose(&mut self, logits: &[f32], best: usize) -> u32 {
        if self.config.temperature == 0.0 {
            return best as u32;
        }
        self.draw(&candidates(logits, logits[best], &self.config))
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

/// The first of the largest logits, if that is a number and none is NaN. Lanes of maxima, which vectors do at once, and then
/// a search: the vocabulary is the longest of all lists.
pub(crate) fn argmax(logits: &[f32]) -> Option<usize> {
    const LANES: usize = 16;
    let (mut largest, mut are_numbers) = ([f32::NEG_INFINITY; LANES], [true; LANES]);
    for logits in logits.chunks(LANES) {
        for ((largest, is_number), logit) in largest.iter_mut().zip(&mut are_numbers).zip(logits) {
            *largest = if *logit > *largest { *logit } else { *largest };
            *is_number &= !logit.is_nan();
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() || are_numbers.contains(&false) {
        return None;
    }
    logits.iter().position(|logit| *logit == largest)
}

/// The logits, those of some tokens made less likely. One that occurs twice is penalized once.
fn penalized(logits: &[f32], window: &[u32], penalty: f32) -> Vec<f32> {
    let mut changed = logits.to_vec();
    for id in window.iter().map(|id| *id as usize) {
        if let (Some(changed), Some(&logit)) = (changed.get_mut(id), logits.get(id)) {
            *changed = if logit > 0.0 {
                logit / penalty
            } else {
                logit * penalty
            };
        }
    }
    changed
}

/// The tokens that may be drawn. The likeliest has mass 1.
fn candidates(logits: &[f32], largest: f32, config: &SampleConfig) -> Vec<Candidate> {
    let mass = |logit: f32| {
        let below = f64::from(logit) - f64::from(largest);
        (below / f64::from(config.temperature)).exp()
    };
    let all = (0..).zip(logits).map(|(id, logit)| Candidate {
        id,
        mass: mass(*logit),
    });
    let mut kept = all.collect();
    keep_largest(&mut kept, config.top_k);
    let mut kept = nucleus(kept, f64::from(config.top_p));
    kept.retain(|candidate| candidate.mass >= f64::from(config.min_p));
    kept
}

/// Keeps the `n` likeliest, all for 0; of equals the lower ids.
fn keep_largest(candidates: &mut Vec<Candidate>, n: usize) {
    if n > 0 && n < candidates.len() {
        candidates.select_nth_unstable_by(n - 1, likelier_first);
        candidates.truncate(n);
        // In the order of ids, which is the order in which the drawn number meets them.
        candidates.sort_unstable_by_key(|candidate| candidate.id);
    }
}

fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.mass.total_cmp(&a.mass).then(a.id.cmp(&b.id))
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
    candidates.sort_unstable_by(likelier_first);

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
            ..SampleConfig::greedy()
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
            assert_eq!(
                sampler(0.0, 1.0, 0).sample(logits, &[]),
                expected,
                "{logits:?}"
            );
            if expected.is_none() {
                assert_eq!(sampler(1.0, 0.9, 0).sample(logits, &[]), None, "{logits:?}");
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
                .map(|_| sampler.sample(&logits, &[]).unwrap())
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
                counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1;
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

    /// The softmax of 0, ln 2, ln 3, ln 4 and −∞ is 0.1, 0.2, 0.3, 0.4 and 0.
    const LOGITS: [f32; 5] = [
        0.0,
        std::f32::consts::LN_2,
        1.098_612_3,
        2.0 * std::f32::consts::LN_2,
        f32::NEG_INFINITY,
    ];

    /// The tokens that may be drawn, by id, with the probability of each.
    fn distribution(logits: &[f32], config: SampleConfig) -> Vec<(u32, f64)> {
        let largest = logits[argmax(logits).unwrap()];
        let mut kept = candidates(logits, largest, &config);
        kept.retain(|candidate| candidate.mass > 0.0);
        kept.sort_unstable_by_key(|candidate| candidate.id);
        let total: f64 = kept.iter().map(|candidate| candidate.mass).sum();
        kept.iter().map(|c| (c.id, c.mass / total)).collect()
    }

    /// Checks which tokens may be drawn of [`LOGITS`], and that each has so many parts of the mass.
    fn check_parts(config: SampleConfig, expected: &[(u32, f64)]) {
        let found = distribution(&LOGITS, config);
        let whole: f64 = expected.iter().map(|(_, parts)| parts).sum();
        let is_close = |(found, (id, parts)): (&(u32, f64), &(u32, f64))| {
            found.0 == *id && (found.1 - parts / whole).abs() < 1e-6
        };
        let close = found.len() == expected.len() && found.iter().zip(expected).all(is_close);
        assert!(close, "{config:?}: {found:?}, expected {expected:?}");
    }

    const WARM: SampleConfig = SampleConfig {
        temperature: 1.0,
        ..SampleConfig::greedy()
    };

    #[test]
    fn every_step_leaves_the_distribution_worked_out_by_hand() {
        let all = [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)];
        let top_k = |top_k| SampleConfig { top_k, ..WARM };
        for (k, n) in [(0, 4), (9, 4), (4, 4), (3, 3), (2, 2), (1, 1)] {
            check_parts(top_k(k), &all[4 - n..]);
        }
        let top_p = |top_p| SampleConfig { top_p, ..WARM };
        for (p, n) in [(0.71, 3), (0.69, 2), (0.39, 1)] {
            check_parts(top_p(p), &all[4 - n..]);
        }
        // Of the three likeliest, 0.75 of the mass are two, 7 of 9; of all four they would be three.
        check_parts(top_p(0.75), &all[1..]);
        let both = SampleConfig {
            top_k: 3,
            ..top_p(0.75)
        };
        check_parts(both, &all[2..]);
        // 0.2 is half of 0.4.
        let min_p = |min_p| SampleConfig { min_p, ..WARM };
        for (p, n) in [(0.499, 3), (0.501, 2), (1.0, 1)] {
            check_parts(min_p(p), &all[4 - n..]);
        }
    }

    #[test]
    fn temperature_comes_before_what_leaves_tokens_out() {
        // At ½ masses are squares.
        let cold = SampleConfig {
            temperature: 0.5,
            ..WARM
        };
        let all = [(0, 1.0), (1, 4.0), (2, 9.0), (3, 16.0)];
        check_parts(cold, &all);
        check_parts(SampleConfig { top_p: 0.8, ..cold }, &all[2..]);
        check_parts(SampleConfig { min_p: 0.3, ..cold }, &all[2..]);
    }

    #[test]
    fn of_equals_top_k_keeps_the_lower_ids() {
        let config = SampleConfig {
            temperature: 1.0,
            top_k: 2,
            ..SampleConfig::greedy()
        };
        let found = distribution(&[1.0, 2.0, 2.0, 2.0, 0.0], config);
        assert_eq!(found, [(1, 0.5), (2, 0.5)]);
    }

    #[test]
    fn tokens_of_the_text_are_penalized_within_the_window() {
        let logits = [3.0, 2.0, -1.0, -1.5];
        assert_eq!(
            penalized(&logits, &[0, 0, 2, 9], 2.0),
            [1.5, 2.0, -2.0, -1.5]
        );
        assert_eq!(penalized(&logits, &[2], 0.5), [3.0, 2.0, -0.5, -1.5]);
        let check = |window, text: &[u32], expected| {
            let config = SampleConfig {
                repetition_penalty: 2.0,
                repetition_window: window,
                ..SampleConfig::greedy()
            };
            let found = Sampler::new(config).unwrap().sample(&logits, text);
            assert_eq!(found, Some(expected), "{window} {text:?}");
        };
        check(0, &[], 0);
        check(0, &[0, 3, 3], 1);
        check(2, &[0, 3, 3], 0);
        check(3, &[0, 3, 3], 1);
        check(9, &[0, 1], 0);
    }

    #[test]
    fn settings_without_a_meaning_are_refused() {
        let plain = SampleConfig::greedy();
        let check = |config, expected| {
            assert_eq!(Sampler::new(config).unwrap_err().to_string(), expected);
        };
        for (temperature, found) in [(-1.0, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let config = SampleConfig {
                temperature,
                ..plain
            };
            check(
                config,
                format!("`temperature`: expected a number from 0 up, found {found}"),
            );
        }
        for (top_p, found) in [(0.0, "0"), (1.5, "1.5")] {
            let config = SampleConfig { top_p, ..plain };
            check(
                config,
                format!("`top_p`: expected a number above 0 and at most 1, found {found}"),
            );
        }
        let config = SampleConfig {
            min_p: 1.5,
            ..plain
        };
        check(
            config,
            "`min_p`: expected a number from 0 to 1, found 1.5".into(),
        );
        let config = SampleConfig {
            repetition_penalty: 0.0,
            ..plain
        };
        check(
            config,
            "`repetition_penalty`: expected a number above 0, found 0".into(),
        );
    }
}
