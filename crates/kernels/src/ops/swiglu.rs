//! The gated activation `silu(gate) · up`, and its gradient.

use crate::simd::exp::exp;
use crate::simd::multiversion;

/// `σ(x)`, of which `silu(x) = x · σ(x)`.
#[inline(always)]
fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

multiversion! {
    /// `out = silu(gate) · up`, element by element.
    fn forward<FMA>(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for (out, (gate, up)) in out.iter_mut().zip(gate.iter().zip(up)) {
            *out = gate * sigmoid::<FMA>(*gate) * up;
        }
    }
}

multiversion! {
    /// Replaces `d(out)` by the gradient of `gate`, and `up` by its own gradient.
    ///
    /// `d silu(g) = σ(g) · (1 + g · (1 − σ(g)))`.
    fn backward<FMA>(dgate: &mut [f32], up: &mut [f32], gate: &[f32]) {
        for ((dgate, up), gate) in dgate.iter_mut().zip(up).zip(gate) {
            let (dout, sigma) = (*dgate, sigmoid::<FMA>(*gate));
            *dgate = dout * *up * sigma * (1.0 + gate * (1.0 - sigma));
            *up = dout * gate * sigma;
        }
    }
}
