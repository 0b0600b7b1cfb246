//! From updates to a model that runs and trains them.

use burn::tensor::Device;

use super::{AdapterWeights, Fused, Pair};
use crate::Error;
use crate::decoder::Model;
use crate::lora::{Adapted, Lora, parameter};
use crate::moe::experts::{ExpertsLora, FactorStacks};
use crate::sites::{PROJECTIONS, Site};

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
                    .linear_lora(path, linear.weight.dims(), site_number, device)
                    .map(|lora| {
                        linear.lora = lora;
                        rest.remove(path);
                        self.linear
                            .get(path)
                            .map(|pair| Adapted::new(path, pair, 1))
                            .into_iter()
                            .collect()
                    }),
                Site::Experts(experts) => self
                    .experts_lora(path, experts.dims(), site_number, device)
                    .map(|found| {
                        let (lora, adapted) =
                            found.map_or((None, vec![]), |(lora, adapted)| (Some(lora), adapted));
                        experts.lora = lora;
                        let n = experts.dims()[0];
                        (0..n)
                            .flat_map(|e| PROJECTIONS.map(|p| format!("{path}.{e}.{p}")))
                            .for_each(|module| _ = rest.remove(&module));
                        adapted
                    }),
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
        dims: [usize; 2],
        site: u64,
        device: &Device,
    ) -> Result<Option<Lora>, Error> {
        let Some(pair) = self.linear.get(path) else {
            return Ok(None);
        };
        self.check_widths(path, pair, dims)?;
        Ok(Some(Lora {
            lora_a: parameter(pair.a.clone(), [pair.rank, dims[1]], device),
            lora_b: parameter(pair.b.clone(), [dims[0], pair.rank], device),
            scale: pair.scale,
            dropout: self.dropout,
            site,
        }))
    }

    fn experts_lora(
        &self,
        path: &str,
        dims: [usize; 3],
        site: u64,
        device: &Device,
    ) -> Result<Option<(ExpertsLora, Vec<Adapted>)>, Error> {
        let [n_experts, inner, hidden] = dims;
        let fused = |fused: Fused| {
            let pairs = self.fused.get(&(path.into(), fused))?;
            Some(pairs.iter().collect::<Vec<_>>())
        };
        let (fused_gate_up, fused_down) = (fused(Fused::GateUp), fused(Fused::Down));
        let is_fused = fused_gate_up.is_some() || fused_down.is_some();
        let [gate, up, down] = PROJECTIONS;
        let classic_gate = self.classic(path, gate, n_experts)?;
        let classic_up = self.classic(path, up, n_experts)?;
        let classic_down = self.classic(path, down, n_experts)?;
        let is_classic = [&classic_gate, &classic_up, &classic_down]
            .into_iter()
            .any(Option::is_some);
        if is_fused && is_classic {
            return Err(self.unfit(
                path,
                "one form of update for the experts of a layer".into(),
                "stacked updates and updates of single experts".into(),
            ));
        }
        let mut adapted = Vec::new();
        let mut stacks = |name: &str, pairs: Option<Vec<&Pair>>, dims: [usize; 2]| {
            let Some(pairs) = pairs else { return Ok(None) };
            let module = format!("{path}.{name}");
            adapted.push(Adapted::new(&module, pairs[0], n_experts));
            self.stacked(&module, &pairs, dims, device).map(Some)
        };
        let lora = ExpertsLora {
            gate_proj: stacks(gate, classic_gate, [inner, hidden])?,
            up_proj: stacks(up, classic_up, [inner, hidden])?,
            gate_up_proj: stacks("gate_up_proj", fused_gate_up, [2 * inner, hidden])?,
            down_proj: stacks(down, fused_down.or(classic_down), [hidden, inner])?,
            is_fused,
            dropout: self.dropout,
            site,
        };
        Ok((!adapted.is_empty()).then_some((lora, adapted)))
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
            if (pair.rank, pair.scale) != (first.rank, first.scale) {
                let shown = |pair: &Pair| format!("rank {} and scale {}", pair.rank, pair.scale);
                let expected = format!("{} for all experts of a layer", shown(first));
                return Err(self.unfit(module, expected, shown(pair)));
            }
        }
        let gather = |of: fn(&Pair) -> &Vec<f32>| {
            let values = pairs.iter().flat_map(|pair| of(pair));
            values.copied().collect::<Vec<_>>()
        };
        let (n, rank) = (pairs.len(), first.rank);
        Ok(FactorStacks {
            lora_a: parameter(gather(|pair| &pair.a), [n, rank, width], device),
            lora_b: parameter(gather(|pair| &pair.b), [n, out, rank], device),
            scale: first.scale,
        })
    }

    /// The pairs of all experts of a layer in the classic dialect: all, or none.
    fn classic(
        &self,
        path: &str,
        projection: &str,
        n_experts: usize,
    ) -> Result<Option<Vec<&Pair>>, Error> {
        let found: Vec<Option<&Pair>> = (0..n_experts)
            .map(|expert| self.linear.get(&format!("{path}.{expert}.{projection}")))
            .collect();
        match found.iter().position(Option::is_none) {
            None => Ok(Some(found.into_iter().flatten().collect())),
            Some(_) if found.iter().all(Option::is_none) => Ok(None),
            Some(missing) => {
                let some = format!("updates of all {n_experts} experts, or of none");
                Err(self.unfit(
                    &format!("{path}.{missing}.{projection}"),
                    some,
                    "nothing".into(),
                ))
            }
        }
    }
}

impl Adapted {
    fn new(module: &str, pair: &Pair, copies: usize) -> Self {
        Self {
            module: module.into(),
            rank: pair.rank,
            alpha: pair.alpha,
            parameters: copies * (pair.a.len() + pair.b.len()),
        }
    }
}
