//! Whether a GPU computes what the CPU does, at the widths of a model.
//!
//! Drivers and compilers have been wrong in silence: products near zero from 500 rows on, gradients that explode at 1,024,
//! gradients that are NaN where only parameters are tracked. So each kind of operation and its gradient is compared before
//! a model is trusted to an adapter, with few rows and with many.

use std::fmt;
use std::sync::Arc;

use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};

use crate::backend::attention::attention;
use crate::backend::elementwise::{embed_frozen, rms_norm, rope, swiglu};
use crate::backend::experts::{ExpertFactors, Routing, choose_experts, dispatch, experts_frozen};
use crate::backend::linear::{linear_frozen, linear_updated};
use crate::backend::loss::cross_entropy_frozen;
use crate::backend::optimizer::{adamw, total};
use crate::backend::traits::Update;
use crate::formats::{Format, Matrix};
use crate::ops::adamw::AdamWStep;
use crate::ops::attention::Segments;
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora};
use crate::ops::rope::RopeLayout;
use crate::ops::route::{GroupScore, TopK};
use crate::settings::Compute;

/// The widths of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Widths {
    /// Of the residual stream.
    pub hidden: usize,
    /// Of the feed-forward part.
    pub inner: usize,
    /// Words of the vocabulary.
    pub vocab: usize,
    /// Experts; 0 for none.
    pub experts: usize,
    /// Features of a head.
    pub head: usize,
}

/// An operation that differs.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationDifference {
    /// What differs: the operation, and its value or a gradient.
    pub what: String,
    /// The widths and rows.
    pub at: String,
    /// The CPU's value.
    pub expected: f32,
    /// The device's.
    pub found: f32,
}

impl fmt::Display for OperationDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            at,
            expected,
            found,
        } = self;
        write!(f, "{what}, {at}: expected {expected:e}, found {found:e}")
    }
}

/// Rows of the comparisons: one, few, and more than the lengths from which others saw failures.
const COMPARED_ROWS: [usize; 3] = [1, 8, 1100];
/// Experts and words that are compared, at most: each has its own rows of a weight, and more show nothing new.
const COMPARED_EXPERTS: usize = 4;
const COMPARED_WORDS: usize = 2048;
/// Sums in f32 in another order, relative to the largest value.
const TOLERANCE: f32 = 2e-4;

/// Compares operations and gradients with the CPU's. `spoil` names one whose results are changed first, or `device`, which
/// then fails: for tests of what happens.
///
/// # Errors
/// The first operation that differs.
pub fn self_test(
    device: &Device,
    widths: Widths,
    spoil: Option<&str>,
) -> Result<(), OperationDifference> {
    if spoil == Some(FAILURE) {
        fail(device);
    }
    for rows in COMPARED_ROWS {
        for tracks_input in [true, false] {
            let compare = |what: &str, run: &dyn Fn(&Case<'_>) -> Outcome| {
                let case = |device| Case {
                    device,
                    widths,
                    rows,
                    tracks_input,
                };
                let mut found = run(&case(device));
                if spoil == Some(what) {
                    found[0].1[0] += 1.0;
                }
                expect_equal(what, &case(device), &found, &run(&case(&Device::flex())))
            };
            compare("linear", &linear)?;
            compare("linear with an update", &updated)?;
            compare("norm, rotation and SwiGLU", &elementwise)?;
            compare("attention", &attended)?;
            compare("loss", &loss)?;
            if widths.experts > 0 {
                compare("experts", &experts)?;
            }
            compare("optimizer", &optimizer)?;
        }
    }
    Ok(())
}

/// What to spoil, so that the device itself fails.
const FAILURE: &str = "device";

/// Asks for what WGSL lacks, which ends the device's own thread.
fn fail(device: &Device) {
    let x = Tensor::<1>::ones([8], device).cast(burn::tensor::DType::BF16);
    let _ = read(x * 2.0);
}

/// One comparison.
struct Case<'a> {
    device: &'a Device,
    widths: Widths,
    rows: usize,
    /// Whether the input has a gradient, besides the parameters.
    tracks_input: bool,
}

/// The name of a gradient, and how it is found.
type NamedGradient<'a> = (&'static str, &'a dyn Fn(&Gradients) -> Option<Vec<f32>>);

/// Named values: of the operation, and of its gradients.
type Outcome = Vec<(&'static str, Vec<f32>)>;

impl Case<'_> {
    fn autodiff(&self) -> Device {
        self.device.clone().autodiff()
    }

    /// Values between −1 and 1, the same on every device.
    fn tensor<const D: usize>(&self, shape: [usize; D], seed: u32) -> Tensor<D> {
        let values = noise(shape.iter().product(), seed);
        Tensor::from_data(TensorData::new(values, shape), &self.autodiff())
    }

    fn input<const D: usize>(&self, shape: [usize; D], seed: u32) -> Tensor<D> {
        let input = self.tensor(shape, seed);
        if self.tracks_input {
            input.require_grad()
        } else {
            input
        }
    }

    fn parameter<const D: usize>(&self, shape: [usize; D], seed: u32) -> Tensor<D> {
        self.tensor(shape, seed).require_grad()
    }

    /// A weight in bf16 on the device.
    fn weight(&self, rows: usize, cols: usize, seed: u32) -> Arc<Matrix> {
        Arc::new(self.weights(1, rows, cols, seed).remove(0))
    }

    fn weights(&self, n: usize, rows: usize, cols: usize, seed: u32) -> Vec<Matrix> {
        let one = |i: u32| {
            let values = noise(rows * cols, seed + i).into_iter();
            let bytes: Vec<u8> = values
                .flat_map(|v| half::bf16::from_f32(v / 16.0).to_le_bytes())
                .collect();
            Matrix::dense(rows, cols, Format::Bf16, bytes.into()).expect("bytes of this shape")
        };
        let mut list: Vec<Matrix> = (0..n as u32).map(one).collect();
        // What cannot be placed is decoded on the host: slower, and no less right.
        let _ = Matrix::place(&mut list, self.device, &mut |_| ());
        list
    }

    fn ids(&self, below: usize) -> Tensor<1, Int> {
        let ids: Vec<i32> = (0..self.rows).map(|i| (i * 31 % below) as i32).collect();
        Tensor::from_data(TensorData::new(ids, [self.rows]), &self.autodiff())
    }

    /// Values, and the gradients of a weighted sum of them.
    fn outcome<const D: usize>(&self, y: Tensor<D>, of: &[NamedGradient<'_>]) -> Outcome {
        let n = y.dims().iter().product();
        let weights = self.tensor([n], 99);
        let grads = total(y.clone().reshape([n]) * weights).backward();
        let mut outcome = vec![("value", read(y))];
        for (name, grad) in of {
            outcome.extend(grad(&grads).map(|grad| (*name, grad)));
        }
        outcome
    }
}

fn read<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("values are f32")
}

/// Pseudo-random values in [−1, 1).
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    })
    .take(n)
    .collect()
}

/// The gradient of a tensor.
macro_rules! grad {
    ($x:expr) => {
        &|grads| $x.grad(grads).map(read)
    };
}

fn linear(case: &Case<'_>) -> Outcome {
    let Widths { hidden, inner, .. } = case.widths;
    let (x, scale) = (
        case.input([case.rows, hidden], 1),
        case.parameter([1, inner], 2),
    );
    let y = linear_frozen(x.clone(), &case.weight(inner, hidden, 3), Compute::F32);
    case.outcome(
        y * scale.clone(),
        &[("gradient of x", grad!(x)), ("of a scale", grad!(scale))],
    )
}

fn updated(case: &Case<'_>) -> Outcome {
    let Widths { hidden, inner, .. } = case.widths;
    let x = case.input([case.rows, hidden], 1);
    let (a, b) = (
        case.parameter([8, hidden], 2),
        case.parameter([inner, 8], 3),
    );
    let update = Update {
        scale: 0.5,
        compute: Compute::F32,
        saved_as: Compute::F32,
    };
    let w = case.weight(inner, hidden, 4);
    let y = linear_updated(x.clone(), &w, [a.clone(), b.clone()], update);
    let grads: [NamedGradient<'_>; 3] = [
        ("gradient of x", grad!(x)),
        ("of a", grad!(a)),
        ("of b", grad!(b)),
    ];
    case.outcome(y, &grads)
}

fn elementwise(case: &Case<'_>) -> Outcome {
    let (rows, head) = (case.rows, case.widths.head.next_multiple_of(2));
    let (x, weight) = (
        case.input([rows, 2 * head], 1),
        case.parameter([2 * head], 2),
    );
    let normed = rms_norm(x.clone(), weight.clone(), 1e-6).reshape([1, rows, 2, head]);
    let angles = case.tensor([rows, head / 2], 3);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let turned = rope(normed, cos, sin, RopeLayout::Interleaved).reshape([rows, 2 * head]);
    let y = swiglu(turned.clone(), turned, Compute::F32);
    case.outcome(
        y,
        &[("gradient of x", grad!(x)), ("of the norm", grad!(weight))],
    )
}

fn attended(case: &Case<'_>) -> Outcome {
    // Scores of all rows with all rows: fewer show the same from here on.
    let (rows, head) = (case.rows.min(600), case.widths.head);
    let q = case.input([1, rows, 2, head], 1);
    let (k, v) = (
        case.parameter([1, rows, 1, head], 2),
        case.parameter([1, rows, 1, head], 3),
    );
    let y = attention(q.clone(), k.clone(), v.clone(), 0.5, &Segments::whole());
    let grads: [NamedGradient<'_>; 3] = [
        ("gradient of q", grad!(q)),
        ("of k", grad!(k)),
        ("of v", grad!(v)),
    ];
    case.outcome(y, &grads)
}

fn loss(case: &Case<'_>) -> Outcome {
    let words = case.widths.vocab.min(COMPARED_WORDS);
    let head = case.weight(words, case.widths.hidden, 1);
    let h = embed_frozen(case.ids(words), &head) + case.input([case.rows, case.widths.hidden], 2);
    let shift = case.parameter([1, case.widths.hidden], 3);
    let targets = case.ids(words.saturating_sub(1).max(1));
    let h = h * shift.clone();
    let y = cross_entropy_frozen(h, None, &head, targets, Compute::F32);
    case.outcome(y, &[("gradient of h", grad!(shift))])
}

fn experts(case: &Case<'_>) -> Outcome {
    let (n, rows, hidden) = (
        case.widths.experts.min(COMPARED_EXPERTS),
        case.rows,
        case.widths.hidden,
    );
    let inner = case.widths.inner.min(hidden);
    let [gate, up] = [1, 11].map(|seed| case.weights(n, inner, hidden, seed));
    let bank = Arc::new(ExpertBank::new(
        gate,
        up,
        case.weights(n, hidden, inner, 21),
    ));
    let (x, scores) = (case.input([rows, hidden], 31), case.tensor([rows, n], 32));
    let top_k = n.min(2);
    let choice = TopK {
        top_k,
        n_group: 1,
        topk_group: 1,
        group_score: GroupScore::Max,
    };
    let (order, offsets) = dispatch(choose_experts(scores, choice), n);
    let weights = case.parameter([rows, top_k], 33);
    let routing = Routing {
        weights: weights.clone(),
        order,
        offsets,
        part: None,
    };
    let (a, b) = (
        case.parameter([n, 4, hidden], 34),
        case.parameter([n, inner, 4], 35),
    );
    let factors = ExpertFactors {
        gate: Some([a.clone(), b.clone()]),
        up: None,
        down: None,
    };
    let lora = ExpertLora {
        scale: [0.5, 0.0, 0.0],
        dropout: Dropout::OFF,
        quantizer: None,
    };
    let y = experts_frozen(x.clone(), routing, &bank, factors, lora, Compute::F32);
    let grads: [NamedGradient<'_>; 4] = [
        ("gradient of x", grad!(x)),
        ("of the routing", grad!(weights)),
        ("of a", grad!(a)),
        ("of b", grad!(b)),
    ];
    case.outcome(y, &grads)
}

fn optimizer(case: &Case<'_>) -> Outcome {
    let n = case.rows * case.widths.head;
    let plain = |seed| case.tensor([n], seed).inner();
    let step = AdamWStep {
        rate: 1e-2,
        betas: [0.9, 0.99],
        eps: 1e-8,
        weight_decay: 0.1,
        number: 3,
        gradient_scale: 0.5,
        noise: None,
        first: 0,
    };
    let second = plain(4) * plain(4);
    let (p, [m, v]) = adamw(plain(1), plain(2), [plain(3), second], step);
    vec![
        ("value", read(p)),
        ("first moment", read(m)),
        ("second moment", read(v)),
    ]
}

/// Refuses the first value that is off.
fn expect_equal(
    what: &str,
    case: &Case<'_>,
    found: &Outcome,
    expected: &Outcome,
) -> Result<(), OperationDifference> {
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let largest = expected.iter().fold(1e-2f32, |most, v| most.max(v.abs()));
        let differ = |(found, expected): &(&f32, &f32)| {
            // NaN is not near, so it differs.
            let is_near = (**found - **expected).abs() <= TOLERANCE * largest;
            !is_near
        };
        if let Some((found, expected)) = found.iter().zip(expected).find(differ) {
            let Widths { hidden, inner, .. } = case.widths;
            let tracked = if case.tracks_input {
                ""
            } else {
                ", only parameters tracked"
            };
            return Err(OperationDifference {
                what: format!("{what}, {name}"),
                at: format!("{} rows of {hidden} and {inner}{tracked}", case.rows),
                expected: *expected,
                found: *found,
            });
        }
    }
    let missing = found.len() != expected.len();
    missing
        .then(|| OperationDifference {
            what: format!("{what}, number of gradients"),
            at: format!("{} rows", case.rows),
            expected: expected.len() as f32,
            found: found.len() as f32,
        })
        .map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTHS: Widths = Widths {
        hidden: 40,
        inner: 24,
        vocab: 50,
        experts: 5,
        head: 6,
    };

    #[test]
    fn the_cpu_passes_and_what_is_spoiled_is_named() {
        assert_eq!(self_test(&Device::flex(), WIDTHS, None), Ok(()));
        for what in ["linear", "attention", "loss", "experts", "optimizer"] {
            let difference = self_test(&Device::flex(), WIDTHS, Some(what)).unwrap_err();
            let text = difference.to_string();
            assert!(
                text.starts_with(what) && text.contains("1 rows of 40 and 24"),
                "{text}"
            );
        }
    }
}
