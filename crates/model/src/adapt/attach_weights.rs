//! From updates to a model that runs and trains them.

use burn::tensor::Device;

use super::{AdapterWeights, Fused, Pair};
use crate::Error;
use crate::decoder::Model;
use crate::modules::linear::Weight;
use crate::adapt::attach::{Adapted, Dora, Lora, check_dora, parameter};
use crate::modules::experts::{Experts, ExpertsLora, FactorStacks};
use crate::decoder::visit::{PROJECTIONS, Site};

impl AdapterWeights {
    /// Puts the updates on a model; they may be trained from there on if the device tracks gradients.
    ///
    /// # Errors
    /// If a module is not the model's, or an update has other widths than its weight.
    pub fn attach(&self, model: &mut Model, device: &Device) -> Result<Vec<Adapted>, Error> {
        let mut rest: std::collections::BTreeSet<String> = self.modules().into_iter().collect();
        let (mut adapted, mut failure, mut site_number) = (Vec::new(), None, 0);
        model.for_each_site(&mut |path, site| {
            site_number += 1;
            let found = match site {
                Site::Linear(linear) => self
                    .linear_lora(path, &linear.weight, site_number, device)
                    .map(|lora| {
                        linear.lora = lora;
                        rest.remove(path);
                        self.linear
                            .get(path)
                            .map(|pair| Adapted::new(path, pair))
                            .into_iter()
                            .collect()
                    }),
                Site::Experts(experts) => {
                    let n = experts.dims()[0];
                    (0..n)
                        .flat_map(|e| PROJECTIONS.map(|p| format!("{path}.{e}.{p}")))
                        .for_each(|module| _ = rest.remove(&module));
                    self.attach_experts(path, experts, site_number, device)
                }
            };
            match found {
                Ok(found) => adapted.extend(found),
                Err(error) => failure = failure.take().or(Some(error)),
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        match rest.first() {
            None => Ok(adapted),
            Some(module) => Err(self.unfit(
                module,
                "a module of the model".into(),
                "an adapter for another model".into(),
            )),
        }
    }

    fn check_widths(
        &self,
        module: &str,
        pair: &Pair,
        [out, width]: [usize; 2],
    ) -> Result<(), Error> {
        if pair.widths() == [width, out] {
            return Ok(());
        }
        let [found_in, found_out] = pair.widths();
        Err(self.unfit(
            module,
            format!("an update of [{out}, {width}]"),
            format!("one of [{found_out}, {found_in}]"),
        ))
    }

    fn linear_lora(
        &self,
        path: &str,
        weight: &Weight,
        site: u64,
        device: &Device,
    ) -> Result<Option<Lora>, Error> {
        let Some(pair) = self.linear.get(path) else {
            return Ok(None);
        };
        let dims = weight.dims();
        self.check_widths(path, pair, dims)?;
        let mut lora = Lora {
            lora_a: parameter(pair.a.clone(), [pair.rank, dims[1]], device),
            lora_b: parameter(pair.b.clone(), [dims[0], pair.rank], device),
            scale: pair.scale,
            dropout: self.dropout,
            site,
            dora: None,
        };
        if let Some(magnitude) = &pair.magnitude {
            check_dora(path)?;
            // Where nothing is trained the norms stay what they are: a decoded token would cost as much as they do.
            let norms = (!device.is_autodiff()).then(|| lora.row_norms(weight));
            lora.dora = Some(Dora {
                lora_magnitude_vector: parameter(magnitude.clone(), [dims[0]], device),
                norms,
            });
        }
        Ok(Some(lora))
    }

    /// Puts the updates of a layer's experts on them: of all, or of some.
    fn attach_experts(
        &self,
        path: &str,
        experts: &mut Experts,
        site: u64,
        device: &Device,
    ) -> Result<Vec<Adapted>, Error> {
        let [n_experts, inner, hidden] = experts.dims();
        let fused = |fused: Fused| {
            let pairs = self.fused.get(&(path.into(), fused))?;
            Some(pairs.iter().collect::<Vec<_>>())
        };
        let (fused_gate_up, fused_down) = (fused(Fused::GateUp), fused(Fused::Down));
        let is_fused = fused_gate_up.is_some() || fused_down.is_some();
        let numbers = self.numbers(path, n_experts)?;
        if is_fused && !numbers.is_empty() {
            return Err(self.unfit(
                path,
                "one form of update for the experts of a layer".into(),
                "stacked updates and updates of single experts".into(),
            ));
        }
        let mut adapted = Vec::new();
        let mut stacks = |name: &str, pairs: Option<Vec<&Pair>>, dims: [usize; 2]| {
            let Some(pairs) = pairs else {
                return Ok::<_, Error>(None);
            };
            let module = format!("{path}.{name}");
            let stacks = self.stacked(&module, &pairs, dims, device)?;
            adapted.push(Adapted {
                parameters: [&stacks.lora_a, &stacks.lora_b]
                    .map(|factor| factor.val().shape().num_elements())
                    .iter()
                    .sum(),
                ..Adapted::new(&module, pairs[0])
            });
            Ok(Some(stacks))
        };
        let classic = |projection| self.classic(path, projection, &numbers);
        let [gate, up, down] = PROJECTIONS;
        let lora = ExpertsLora {
            gate_proj: stacks(gate, classic(gate), [inner, hidden])?,
            up_proj: stacks(up, classic(up), [inner, hidden])?,
            gate_up_proj: stacks("gate_up_proj", fused_gate_up, [2 * inner, hidden])?,
            down_proj: stacks(down, fused_down.or(classic(down)), [hidden, inner])?,
            is_fused,
            dropout: self.dropout,
            site,
        };
        if !adapted.is_empty() {
            if !is_fused {
                experts.choose(numbers);
            }
            experts.lora = Some(lora);
        }
        Ok(adapted)
    }

    /// The pairs of all experts as stacks, for a weight `[out, width]`.
    fn stacked(
        &self,
        module: &str,
        pairs: &[&Pair],
        [out, width]: [usize; 2],
        device: &Device,
    ) -> Result<FactorStacks, Error> {
        let first = pairs[0];
        for pair in pairs {
            self.check_widths(module, pair, [out, width])?;
            if pair.magnitude.is_some() {
                check_dora(module)?;
            }
            if (pair.rank, pair.scale) != (first.rank, first.scale) {
                let shown = |pair: &Pair| format!("rank {} and scale {}", pair.rank, pair.scale);
                let expected = format!("{} for all experts of a layer", shown(first));
                return Err(self.unfit(module, expected, shown(pair)));
            }
        }
        let projection = module.rsplit('.').next().unwrap_or(module);
        let shared = self
            .share
            .map_or([false; 2], |share| share.factors(projection));
        let gather = |of: fn(&Pair) -> &Vec<f32>, is_shared: bool| {
            if !is_shared {
                let values = pairs.iter().flat_map(|pair| of(pair));
                return Ok((values.copied().collect::<Vec<_>>(), pairs.len()));
            }
            match pairs.iter().all(|pair| of(pair) == of(first)) {
                true => Ok((of(first).clone(), 1)),
                false => Err(self.unfit(
                    module,
                    "one factor for all experts, as moeforge.json says".into(),
                    "different ones".into(),
                )),
            }
        };
        let (a, n_a) = gather(|pair| &pair.a, shared[0])?;
        let (b, n_b) = gather(|pair| &pair.b, shared[1])?;
        let rank = first.rank;
        Ok(FactorStacks {
            lora_a: parameter(a, [n_a, rank, width], device),
            lora_b: parameter(b, [n_b, out, rank], device),
            scale: first.scale,
        })
    }

    /// The numbers of a layer's experts that have updates of their own: the same for every projection that has any.
    fn numbers(&self, path: &str, n_experts: usize) -> Result<Vec<usize>, Error> {
        let has = |expert: usize, projection: &str| {
            let module = format!("{path}.{expert}.{projection}");
            self.linear.contains_key(&module)
        };
        let mut all: Vec<usize> = Vec::new();
        for projection in PROJECTIONS {
            let numbers: Vec<usize> = (0..n_experts).filter(|e| has(*e, projection)).collect();
            if all.is_empty() {
                all = numbers;
            } else if !numbers.is_empty() && numbers != all {
                return Err(self.unfit(
                    &format!("{path}.{projection}"),
                    format!(
                        "updates of the {} experts that other projections update",
                        all.len()
                    ),
                    format!("updates of {}, or of others", numbers.len()),
                ));
            }
        }
        Ok(all)
    }

    /// The pairs of some experts in the classic dialect, if the projection has any.
    fn classic(&self, path: &str, projection: &str, numbers: &[usize]) -> Option<Vec<&Pair>> {
        let pair = |expert: &usize| self.linear.get(&format!("{path}.{expert}.{projection}"));
        let pairs: Option<Vec<&Pair>> = numbers.iter().map(pair).collect();
        pairs.filter(|pairs| !pairs.is_empty())
    }
}

impl Adapted {
    fn new(module: &str, pair: &Pair) -> Self {
        let magnitude = pair.magnitude.as_ref().map_or(0, Vec::len);
        Self {
            module: module.into(),
            rank: pair.rank,
            alpha: pair.alpha,
            parameters: pair.a.len() + pair.b.len() + magnitude,
        }
    }
}
