//! Rotary frequencies, their stretching for long contexts, and the tables that a forward pass rotates by.
//!
//! Source: YaRN as in deepseek-ai/DeepSeek-V3: inference/model.py, `precompute_freqs_cis`; Llama 3's as in
//! huggingface/transformers: modeling_rope_utils.py. The correction range's upper end is clamped to `dim − 1`, not
//! to `dim / 2 − 1`, as published.

use std::f64::consts::PI;

use burn::tensor::{Device, Tensor, TensorData};
use kernels::RopeLayout;

use crate::config::{RopeConfig, RopeScaling};

/// Cosines and sines of the positions of one forward pass: `[seq, dim / 2]` each, or `[batch · seq, dim / 2]` if the rows of
/// the input have different positions.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    /// Cosines.
    pub cos: Tensor<2>,
    /// Sines.
    pub sin: Tensor<2>,
}

impl RotaryTable {
    /// The tables of the given positions, for heads of width `dim`.
    pub fn new(
        rope: &RopeConfig,
        positions: impl ExactSizeIterator<Item = usize>,
        dim: usize,
        device: &Device,
    ) -> Self {
        let (frequencies, amplitude) = (rope.frequencies(dim), rope.amplitude() as f32);
        let shape = [positions.len(), dim / 2];
        // f32 products of position and frequency, as the reference implementation computes them.
        let angles: Vec<f32> = positions
            .flat_map(|p| frequencies.iter().map(move |f| p as f32 * f))
            .collect();
        let tensor = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|angle| f(*angle) * amplitude).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        Self {
            cos: tensor(f32::cos),
            sin: tensor(f32::sin),
        }
    }

    /// Rotates the last features of every head of `x` `[batch, seq, heads, dim]`.
    pub(crate) fn rotate(&self, x: Tensor<4>, layout: RopeLayout) -> Tensor<4> {
        let [batch, seq, heads, dim] = x.dims();
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        if cos.dims()[0] == seq {
            return kernels::rope(x, cos, sin, layout);
        }
        let x = x.reshape([1, batch * seq, heads, dim]);
        kernels::rope(x, cos, sin, layout).reshape([batch, seq, heads, dim])
    }
}

impl RopeConfig {
    /// The angle per position of every pair of a head of width `dim`.
    pub fn frequencies(&self, dim: usize) -> Vec<f32> {
        let plain = |j: usize| self.theta.powf(-2.0 * j as f64 / dim as f64);
        let stretched = |j: usize| match self.scaling {
            RopeScaling::Plain => plain(j),
            RopeScaling::Linear { factor } => plain(j) / factor,
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                let rotations = |n: f64| {
                    dim as f64 * (original / (2.0 * PI * n)).ln() / (2.0 * self.theta.ln())
                };
                let [low, high] = [rotations(beta_fast), rotations(beta_slow)];
                let [low, high] = if truncate {
                    [low.floor(), high.ceil()]
                } else {
                    [low, high]
                };
                let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(j) / factor * ramp + plain(j) * (1.0 - ramp)
            }
            RopeScaling::Llama3 {
                factor,
                original,
                low,
                high,
            } => {
                let wavelength = 2.0 * PI / plain(j);
                let blend = (original / wavelength - low) / (high - low);
                match wavelength {
                    short if short < original / high => plain(j),
                    long if long > original / low => plain(j) / factor,
                    _ => plain(j) / factor * (1.0 - blend) + plain(j) * blend,
                }
            }
        };
        (0..dim / 2).map(|j| stretched(j) as f32).collect()
    }

    /// The factor of cosines and sines; 1 in all releases.
    pub(crate) fn amplitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor: Some(factor),
                ..
            } => factor,
            RopeScaling::Yarn {
                factor,
                mscale,
                mscale_all_dim,
                ..
            } if mscale != 0.0 && mscale_all_dim != 0.0 => {
                temperature(factor, mscale) / temperature(factor, mscale_all_dim)
            }
            RopeScaling::Yarn { factor, .. } => temperature(factor, 1.0),
            RopeScaling::Plain | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// The factor of the scores of latent attention: `dim^-½`, times YaRN's temperature squared. Grouped queries have no such
    /// temperature.
    pub fn softmax_scale(&self, dim: usize) -> f32 {
        let squared = match self.scaling {
            RopeScaling::Yarn {
                factor,
                mscale_all_dim,
                ..
            } if mscale_all_dim != 0.0 => temperature(factor, mscale_all_dim).powi(2),
            _ => 1.0,
        };
        ((dim as f64).powf(-0.5) * squared) as f32
    }
}

fn temperature(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 40.0,
            original: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 1.0,
            attention_factor: None,
            truncate: true,
        };
        let rope = RopeConfig {
            theta: 10_000.0,
            scaling,
            layout: RopeLayout::Interleaved,
        };
        let (frequencies, plain) = (rope.frequencies(64), |j: usize| {
            10_000f64.powf(-(j as f64) / 32.0) as f32
        });
        assert_eq!(frequencies[0], 1.0);
        assert_eq!(frequencies[10], plain(10));
        assert!((frequencies[31] / (plain(31) / 40.0) - 1.0).abs() < 1e-6);
        assert!(frequencies[16] < plain(16) && frequencies[16] > plain(16) / 40.0);
        // V3's published value: 192^-½ · (0.1 ln 40 + 1)².
        assert!(
            (rope.softmax_scale(192) - 0.135_234).abs() < 1e-6,
            "{}",
            rope.softmax_scale(192)
        );
    }
}
