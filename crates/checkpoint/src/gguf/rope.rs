//! Llama 3's scaled rope: settings in a config, and a tensor of the divisors of the frequencies in a GGUF.
//!
//! Source: ggml-org/llama.cpp: conversion/llama.py, `generate_extra_tensors`.

use std::f64::consts::PI;

use serde_json::{Value, json};

/// The tensor.
pub(crate) const DIVISORS: &str = "rope_freqs.weight";
/// Relative tolerance for the divisors of a setting against those of a file: f32 was rounded a few times.
const ROUNDING: f64 = 1e-5;

/// Waves of more than `high` turns in the original context stay, waves of fewer than `low` turns become `factor` times as long,
/// and there is a ramp between.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    factor: f64,
    original: f64,
    low: f64,
    high: f64,
}

/// Turns per position of every frequency of a head with twice that number of features.
fn turns(theta: f64, len: usize) -> impl Iterator<Item = f64> {
    (0..len).map(move |j| theta.powf(-(j as f64) / len as f64) / (2.0 * PI))
}

impl Stretch {
    /// The scaling of a config, if it has one.
    fn of(config: &Value) -> Option<Self> {
        let scaling = config.get("rope_scaling")?;
        let number = |key: &str| scaling.get(key)?.as_f64();
        let is_llama3 = scaling.get("rope_type")? == "llama3";
        is_llama3.then_some(Self {
            factor: number("factor")?,
            original: number("original_max_position_embeddings")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
        })
    }

    fn divisor(&self, turns: f64) -> f64 {
        let ramp = (turns * self.original - self.low) / (self.high - self.low);
        match ramp {
            ramp if ramp > 1.0 => 1.0,
            ramp if ramp < 0.0 => self.factor,
            ramp => 1.0 / ((1.0 - ramp) / self.factor + ramp),
        }
    }

    /// The scaling with these divisors, if there is one. A file determines only the ratios of the context and its two bounds:
    /// of the scalings that fit, it is the one with the plainest numbers.
    fn with(theta: f64, divisors: &[f32]) -> Option<Self> {
        /// Lower bounds to try. It is 1 in every release.
        const LOWS: [f64; 7] = [1.0, 2.0, 4.0, 0.5, 1.5, 0.25, 3.0];
        let factor = f64::from(divisors.iter().copied().fold(1f32, f32::max));
        let fits = |found: &Self| {
            let pairs = turns(theta, divisors.len()).zip(divisors);
            let mut misses = pairs
                .map(|(turns, divisor)| (found.divisor(turns) / f64::from(*divisor) - 1.0).abs());
            found.high > found.low && misses.all(|miss| miss < ROUNDING)
        };
        let ramps = Self::ramps(theta, factor, divisors);
        let with_low = |low: f64| {
            ramps.iter().flat_map(move |(original, high)| {
                let rounded = (high * low * 16.0).round() / 16.0;
                [rounded, high * low].map(|high| Self {
                    factor,
                    original: (original * low).round(),
                    low,
                    high,
                })
            })
        };
        let exact = ramps.iter().map(|(original, high)| Self {
            factor,
            original: *original,
            low: 1.0,
            high: *high,
        });
        let plain = LOWS.into_iter().flat_map(with_low);
        plain.chain(exact).find(fits)
    }

    /// Contexts and upper bounds that may fit, for a lower bound of 1.
    fn ramps(theta: f64, factor: f64, divisors: &[f32]) -> Vec<(f64, f64)> {
        /// Upper bounds to try. It is 4 in every release.
        const HIGHS: [f64; 8] = [4.0, 2.0, 8.0, 3.0, 1.5, 16.0, 1.25, 1.0625];
        // The place on the ramp of each frequency between its ends.
        let ramp =
            |divisor: &f32| (1.0 / f64::from(*divisor) - 1.0 / factor) / (1.0 - 1.0 / factor);
        let points = turns(theta, divisors.len()).zip(divisors.iter().map(ramp));
        let mut points = points.filter(|(_, ramp)| *ramp > 1e-4 && *ramp < 1.0 - 1e-4);
        match (points.next(), points.last()) {
            (Some(first), Some(last)) => {
                let slope = (first.1 - last.1) / (first.0 - last.0);
                let below = slope * first.0 - first.1;
                vec![(slope / below, 1.0 + 1.0 / below)]
            }
            (Some((turns, ramp)), None) => {
                let with = |high| ((1.0 + (high - 1.0) * ramp) / turns, high);
                HIGHS.map(with).to_vec()
            }
            // The ramp is between the last frequency that stays and the first that is fully scaled.
            (None, _) => {
                let n_kept = divisors.iter().take_while(|d| **d == 1.0).count();
                let mut ends = turns(theta, divisors.len()).skip(n_kept.saturating_sub(1));
                let (Some(kept), Some(scaled)) = (ends.next(), ends.next()) else {
                    return vec![];
                };
                let middle = (4.0 / (kept * scaled)).sqrt().log2().round().exp2();
                vec![(middle, 4.0), (1.0 / scaled, kept / scaled)]
            }
        }
    }
}

/// YaRN's own factor of cosines and sines.
pub(crate) fn own_attention_factor(scaling: &Value) -> Option<f64> {
    Some(temperature(scaling.get("factor")?.as_f64()?, 1.0))
}

/// The factor of cosines and sines that a YaRN in a config has in place of its own.
pub(crate) fn attention_factor(scaling: &Value) -> Option<f64> {
    let number = |key: &str| scaling.get(key)?.as_f64();
    let by_mscale = || {
        let [numerator, denominator] = ["mscale", "mscale_all_dim"].map(number);
        let factor = number("factor")?;
        let [numerator, denominator] = [numerator?, denominator?];
        (numerator != 0.0 && denominator != 0.0)
            .then(|| temperature(factor, numerator) / temperature(factor, denominator))
    };
    number("attention_factor").or_else(by_mscale)
}

fn temperature(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

/// The divisors of the frequencies of a model with this config, if it scales them so.
pub(crate) fn divisors(config: &Value) -> Option<Vec<f32>> {
    let stretch = Stretch::of(config)?;
    let count = |key: &str| config.get(key).and_then(Value::as_u64);
    let width = count("head_dim").filter(|width| *width > 0);
    let width =
        width.or_else(|| count("hidden_size")?.checked_div(count("num_attention_heads")?))?;
    let theta = config.get("rope_theta")?.as_f64()?;
    let turns = turns(theta, width as usize / 2);
    Some(turns.map(|turns| stretch.divisor(turns) as f32).collect())
}

/// The `rope_scaling` of a config with these divisors: null if nothing is divided, none if Llama 3's scaling has no such
/// divisors.
pub(crate) fn scaling(theta: f64, divisors: &[f32]) -> Option<Value> {
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Some(Value::Null);
    }
    let stretch = Stretch::with(theta, divisors)?;
    Some(json!({
        "rope_type": "llama3",
        "factor": stretch.factor,
        "original_max_position_embeddings": length(stretch.original),
        "low_freq_factor": stretch.low,
        "high_freq_factor": stretch.high,
    }))
}

/// A length as people write it: whole, unless it is not.
fn length(length: f64) -> Value {
    if length.fract() == 0.0 {
        json!(length as u64)
    } else {
        json!(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(factor: f64, original: u64, high: f64, theta: f64, width: u64) -> Value {
        json!({
            "rope_theta": theta, "head_dim": width,
            "rope_scaling": {
                "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original,
                "low_freq_factor": 1.0, "high_freq_factor": high,
            },
        })
    }

    /// Llama 3.1, 3.2, small ones with one frequency on the ramp and with none, and one with other bounds.
    #[test]
    fn settings_come_back_from_divisors() {
        for config in [
            config(8.0, 8192, 4.0, 500_000.0, 128),
            config(32.0, 8192, 4.0, 500_000.0, 64),
            config(8.0, 64, 4.0, 500_000.0, 16),
            config(8.0, 64, 4.0, 500_000.0, 8),
            config(4.0, 2048, 2.5, 10_000.0, 96),
        ] {
            let divisors = divisors(&config).unwrap();
            let found = scaling(config["rope_theta"].as_f64().unwrap(), &divisors);
            assert_eq!(found.unwrap(), config["rope_scaling"]);
        }
        assert_eq!(scaling(1e4, &[1.0; 8]), Some(Value::Null));
        for other in [
            [2.0; 8],
            [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0],
            [f32::NAN; 8],
        ] {
            assert_eq!(scaling(1e4, &other), None);
        }
    }

    /// Bounds of any size: the settings that come back divide every frequency alike.
    #[test]
    fn any_bounds_come_back_as_settings_of_the_same_effect() {
        let lows = [0.5, 1.0, 1.5, 2.0, 2.7, 4.0];
        let ratios = [1.1, 1.5, 2.0, 4.0, 7.3];
        let shapes = [(500_000.0, 128), (500_000.0, 16), (10_000.0, 64), (1e6, 8)];
        let mut cases = 0;
        for (low, ratio) in lows.into_iter().flat_map(|low| ratios.map(|r| (low, r))) {
            for (theta, width) in shapes {
                for original in [64, 1000, 8192] {
                    let mut config = config(8.0, original, low * ratio, theta, width);
                    config["rope_scaling"]["low_freq_factor"] = low.into();
                    let expected = divisors(&config).unwrap();
                    let Some(found) = scaling(theta, &expected) else {
                        panic!("{config}: {expected:?}");
                    };
                    if found.is_null() {
                        continue;
                    }
                    cases += 1;
                    config["rope_scaling"] = found;
                    let found = divisors(&config).unwrap();
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!((found / expected - 1.0).abs() < 2e-5, "{config}");
                    }
                }
            }
        }
        assert!(cases > 300, "{cases}");
    }

    /// The formula of llama.cpp's converter, computed in Python for Llama 3.1.
    #[test]
    fn divisors_are_the_converters() {
        let divisors = divisors(&config(8.0, 8192, 4.0, 500_000.0, 128)).unwrap();
        assert_eq!(divisors.len(), 64);
        for (at, expected) in EXPECTED {
            assert!(
                (divisors[at] / expected - 1.0).abs() < 1e-5,
                "{at}: {}",
                divisors[at]
            );
        }
    }

    const EXPECTED: [(usize, f32); 6] = [
        (0, 1.0),
        (28, 1.0),
        (29, 1.20748),
        (34, 5.25733),
        (35, 8.0),
        (63, 8.0),
    ];
}
