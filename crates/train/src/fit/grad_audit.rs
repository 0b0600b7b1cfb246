//! The gradient audit: which tensors the first step's gradient reaches, and why it is zero in the others.
//!
//! A module that never gets a gradient trains nothing, and nobody notices. In the first step most zeros have a good reason:
//! while a low-rank update's second factor is zero its first factor has no gradient, and neither has an expert without a
//! token.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use kernels::device::read;
use model::Parameter;
use parallel::{MessageReader, MessageWriter};
use serde::Serialize;

use crate::Result;
use crate::routing::ExpertLoads;

/// The file in the run directory.
const GRADIENTS_NAME: &str = "gradients.json";

/// The first step's gradients, tensor by tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GradAudit {
    /// Every trained tensor.
    pub tensors: Vec<TensorGradient>,
}

/// The first gradient of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorGradient {
    /// Its name.
    pub name: String,
    /// The gradient's norm.
    pub norm: f64,
    /// Why it is zero, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero: Option<ZeroGradient>,
    /// The experts whose gradient is zero because they got no token.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts_without_token: Vec<usize>,
}

/// Why a gradient is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroGradient {
    /// The second factor of this first factor is still zero: this passes with the first step.
    SecondFactorIsZero,
    /// None of its experts got a token.
    NoToken,
    /// The loss does not depend on it.
    NotReached,
    /// The loss depends on it, and its gradient is zero all the same.
    Unknown,
}

/// What the audit is made of, tensor by tensor: said by the owner of each.
#[derive(Debug, Default)]
pub(crate) struct GradientFacts {
    /// Sums of the gradient's squares: one for each expert of a stack, else one. None if there is no gradient.
    squares: Option<Vec<f64>>,
    /// Whether the tensor's values are zero; said of second factors alone.
    is_zero: bool,
}

impl GradientFacts {
    /// Reads a tensor, or a rank's part of it, from the device.
    pub(crate) fn of(parameter: &Parameter, gradient: Option<Tensor<1>>) -> Self {
        let is_zero = || read(parameter.values.clone()).iter().all(|x| *x == 0.0);
        Self {
            squares: gradient.map(|gradient| squares(gradient, parameter)),
            is_zero: parameter.name.ends_with("lora_b") && is_zero(),
        }
    }

    pub(crate) fn write(&self, message: &mut MessageWriter) {
        message.count(u64::from(self.is_zero));
        message.count(u64::from(self.squares.is_some()));
        let squares = self.squares.as_deref().unwrap_or_default();
        message.count(squares.len() as u64);
        squares
            .iter()
            .for_each(|square| _ = message.number(*square));
    }

    pub(crate) fn read(reader: &mut MessageReader<'_>) -> Result<Self> {
        let [is_zero, has_gradient] = [reader.count()? == 1, reader.count()? == 1];
        let n = reader.count()?;
        let squares = (0..n).map(|_| reader.number());
        let squares = squares.collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Self {
            squares: has_gradient.then_some(squares),
            is_zero,
        })
    }

    /// Adds what the owner of the next part says.
    pub(crate) fn join(&mut self, next: Self) {
        self.is_zero &= next.is_zero;
        match (&mut self.squares, next.squares) {
            (Some(squares), Some(next)) => squares.extend(next),
            (squares, next) => *squares = squares.take().or(next),
        }
    }
}

impl GradAudit {
    /// Audits the gradients of a step. It copies them to the host, so it is for one step only. `experts` returns the numbers
    /// of a stack's experts.
    pub(crate) fn new(
        parameters: &[Parameter],
        experts: &dyn Fn(&str) -> Vec<usize>,
        facts: &BTreeMap<String, GradientFacts>,
        loads: &ExpertLoads,
    ) -> Self {
        let entry = |parameter: &Parameter| {
            let found = facts.get(&parameter.name);
            let Some(squares) = found.and_then(|found| found.squares.as_ref()) else {
                return TensorGradient {
                    name: parameter.name.clone(),
                    norm: 0.0,
                    zero: Some(ZeroGradient::NotReached),
                    experts_without_token: vec![],
                };
            };
            let experts = match parameter.shape[..] {
                [_, _, _] => experts(&parameter.name),
                _ => vec![],
            };
            let load = load_of(&parameter.name, loads);
            let is_idle = |expert: &usize| load.is_some_and(|load| load.get(*expert) == Some(&0.0));
            // A factor that the experts share has one gradient for all of them.
            let parts = if squares.len() == experts.len() {
                &squares[..]
            } else {
                &[]
            };
            let zeros = experts.iter().zip(parts).filter(|(_, sum)| **sum == 0.0);
            let idle: Vec<usize> = zeros.map(|(n, _)| *n).filter(is_idle).collect();
            let norm = squares.iter().sum::<f64>().sqrt();
            let why = || {
                if second_factor_is_zero(&parameter.name, facts) {
                    ZeroGradient::SecondFactorIsZero
                } else if !experts.is_empty() && experts.iter().all(is_idle) {
                    ZeroGradient::NoToken
                } else {
                    ZeroGradient::Unknown
                }
            };
            TensorGradient {
                name: parameter.name.clone(),
                norm,
                zero: (norm == 0.0).then(why),
                experts_without_token: idle,
            }
        };
        Self {
            tensors: parameters.iter().map(entry).collect(),
        }
    }

    /// Writes it into a run directory.
    pub(crate) fn write(&self, run: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).expect("names and numbers are JSON");
        Ok(checkpoint::write_file(
            &run.join(GRADIENTS_NAME),
            format!("{json}\n").as_bytes(),
        )?)
    }

    /// One sentence for the person at the terminal.
    pub fn summary(&self) -> String {
        let zeros = |why: ZeroGradient| self.tensors.iter().filter(move |t| t.zero == Some(why));
        let reached = self.tensors.iter().filter(|t| t.zero.is_none()).count();
        let mut text = format!(
            "first gradient: in {reached} of {} tensors",
            self.tensors.len()
        );
        let waiting = zeros(ZeroGradient::SecondFactorIsZero).count();
        if waiting > 0 {
            text += &format!("; {waiting} are zero only because lora_b starts at zero");
        }
        // An expert has several tensors; the largest number of a layer counts.
        let idle = self
            .tensors
            .iter()
            .map(|t| t.experts_without_token.len())
            .max();
        if let Some(idle) = idle.filter(|idle| *idle > 0) {
            text += &format!("; up to {idle} experts of a layer got no token");
        }
        for (why, what) in [
            (ZeroGradient::NotReached, "not reached by the loss"),
            (ZeroGradient::Unknown, "zero for no known reason"),
        ] {
            if let Some(first) = zeros(why).next() {
                text += &format!("; {what}: {} (`{}`, …)", zeros(why).count(), first.name);
            }
        }
        text + &format!("; see {GRADIENTS_NAME}")
    }
}

/// The sums of squares of a tensor's gradient: one for each expert of a stack, else one.
fn squares(gradient: Tensor<1>, parameter: &Parameter) -> Vec<f64> {
    let n_parts = match parameter.shape[..] {
        [experts, _, _] => experts,
        _ => 1,
    };
    let values: Vec<f64> = read(gradient).into_iter().map(f64::from).collect();
    let part = (values.len() / n_parts.max(1)).max(1);
    let squares = values
        .chunks(part)
        .map(|part| part.iter().map(|x| x * x).sum());
    squares.collect()
}

/// The load of the experts of a tensor's layer.
fn load_of<'a>(parameter: &str, loads: &'a ExpertLoads) -> Option<&'a Vec<f64>> {
    let layer = parameter.split_once("layers.")?.1.split('.').next()?;
    let layer: usize = layer.parse().ok()?;
    let (_, load) = loads.iter().find(|(found, _)| *found == layer)?;
    Some(load)
}

/// Whether a tensor is the first factor of an update whose second one is zero.
fn second_factor_is_zero(parameter: &str, facts: &BTreeMap<String, GradientFacts>) -> bool {
    let Some(module) = parameter.strip_suffix("lora_a") else {
        return false;
    };
    let second = facts.get(&format!("{module}lora_b"));
    second.is_some_and(|second| second.is_zero)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn every_zero_has_its_reason() {
        let device = Device::flex();
        let tensor = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
        let parameter = |name: &str, shape: &[usize], value: f32| Parameter {
            name: format!("model.layers.3.mlp.{name}"),
            shape: shape.to_vec(),
            values: tensor(&vec![value; shape.iter().product()]),
        };
        let parameters = [
            parameter("experts.lora.up_proj.lora_a", &[3, 1, 2], 0.5),
            parameter("experts.lora.up_proj.lora_b", &[3, 2, 1], 0.0),
            parameter("experts.lora.down_proj.lora_b", &[3, 1, 1], 1.0),
            parameter("shared_experts.up_proj.weight", &[2, 1], 1.0),
            parameter("gate.weight", &[1, 1], 1.0),
        ];
        let gradients: [&[f32]; 4] = [
            &[0.0; 6],
            &[0.0, 0.0, 3.0, 4.0, 0.0, 0.0],
            &[0.0; 3],
            &[0.0; 2],
        ];
        let mut gradients = gradients.into_iter().map(tensor);
        let of = |p: &Parameter| (p.name.clone(), GradientFacts::of(p, gradients.next()));
        let facts = parameters.iter().map(of).collect();
        // Expert 1 got tokens: that its part of `down_proj` is zero has another reason.
        let loads = vec![(3, vec![0.0, 4.0, 0.0])];
        let all = |_: &str| vec![0, 1, 2];
        let audit = GradAudit::new(&parameters, &all, &facts, &loads);
        let found: Vec<_> = audit
            .tensors
            .iter()
            .map(|t| (t.norm, t.zero, &t.experts_without_token[..]))
            .collect();
        let expected: [(f64, Option<ZeroGradient>, &[usize]); 5] = [
            (0.0, Some(ZeroGradient::SecondFactorIsZero), &[0, 2]),
            (5.0, None, &[0, 2]),
            (0.0, Some(ZeroGradient::Unknown), &[0, 2]),
            (0.0, Some(ZeroGradient::Unknown), &[]),
            (0.0, Some(ZeroGradient::NotReached), &[]),
        ];
        assert_eq!(found, expected);
        let loads = vec![(3, vec![0.0; 3])];
        let audit = GradAudit::new(&parameters, &all, &facts, &loads);
        assert_eq!(audit.tensors[2].zero, Some(ZeroGradient::NoToken));
        let summary = audit.summary();
        for words in [
            "in 1 of 5",
            "not reached by the loss: 1 (`model.layers.3.mlp.gate.weight`",
            "up to 3 experts",
        ] {
            assert!(summary.contains(words), "{summary}");
        }
    }

    #[test]
    fn parts_are_of_the_chosen_experts_and_a_shared_factor_is_of_all_of_them() {
        let device = Device::flex();
        let tensor = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
        let parameter = |name: &str, shape: [usize; 3]| Parameter {
            name: format!("model.layers.1.mlp.experts.{name}"),
            shape: shape.to_vec(),
            values: tensor(&vec![1.0; shape.iter().product()]),
        };
        let parameters = [
            parameter("weights.trained.up_proj", [2, 1, 1]),
            parameter("lora.up_proj.lora_a", [1, 1, 1]),
        ];
        let found = |gradients: [&[f32]; 2], loads: [f64; 4]| {
            let pairs = parameters.iter().zip(gradients);
            let of = |(p, gradient): (&Parameter, _)| {
                (p.name.clone(), GradientFacts::of(p, Some(tensor(gradient))))
            };
            let facts = pairs.map(of).collect();
            let loads = vec![(1, loads.to_vec())];
            let audit = GradAudit::new(&parameters, &|_| vec![1, 3], &facts, &loads);
            audit.tensors
        };
        // Experts 1 and 3 are chosen: what 0 and 2 get says nothing.
        let tensors = found([&[0.0, 2.0], &[2.0]], [0.0, 0.0, 9.0, 4.0]);
        assert_eq!(
            (tensors[0].zero, &tensors[0].experts_without_token),
            (None, &vec![1])
        );
        assert_eq!(
            (tensors[1].zero, &tensors[1].experts_without_token),
            (None, &vec![])
        );
        let tensors = found([&[0.0, 0.0], &[0.0]], [7.0, 0.0, 9.0, 0.0]);
        assert_eq!(tensors[0].experts_without_token, [1, 3]);
        assert!(
            tensors
                .iter()
                .all(|tensor| tensor.zero == Some(ZeroGradient::NoToken)),
            "{tensors:?}"
        );
        let tensors = found([&[0.0, 0.0], &[0.0]], [0.0, 1.0, 0.0, 1.0]);
        assert!(
            tensors
                .iter()
                .all(|tensor| tensor.zero == Some(ZeroGradient::Unknown)),
            "{tensors:?}"
        );
    }
}
