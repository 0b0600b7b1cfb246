//! The updates of an adapter, to run and train them on a model.

use std::collections::BTreeSet;
use std::ops::Range;

use burn::tensor::Device;

use super::attach::{UpdateSource, attach_all};
use super::update::{AdaptedModule, ExpertUpdates, UpdateSite, check_dora};
use super::weights::{AdapterWeights, Fused, WeightUpdate};
use crate::Error;
use crate::decoder::Model;
use crate::decoder::visit::ModuleRef;
use crate::keys::{EMBEDDING, PROJECTIONS};
use crate::modules::experts::{Experts, ExpertsLora, FactorStacks};
use crate::modules::linear::Weight;
use crate::modules::lora::{Dora, Lora, parameter};

impl AdapterWeights {
    /// Puts the updates on a model; they may be trained from there on if the device tracks gradients.
    ///
    /// # Errors
    /// If a module is not the model's, or an update has other widths than its weight.
    pub fn attach(&self, model: &mut Model, device: &Device) -> Result<Vec<AdaptedModule>, Error> {
        self.expect_fit(&model.config)?;
        // Updates first: they part a tied head from its embedding.
        let mut adapted = attach_all(model, UpdateSource::Stored(self), device)?;
        adapted.extend(self.replace(model, device)?);
        let mut rest: BTreeSet<String> = self.modules().into_iter().collect();
        rest.remove(EMBEDDING);
        for (path, module) in model.modules() {
            match module {
                ModuleRef::Linear(_) => _ = rest.remove(&path),
                ModuleRef::Experts(experts) => {
                    let names = |expert| PROJECTIONS.map(|name| format!("{path}.{expert}.{name}"));
                    let modules = (0..experts.dims()[0]).flat_map(names);
                    modules.for_each(|module| _ = rest.remove(&module));
                }
            }
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

    /// The update of a linear layer, if the adapter has one.
    pub(super) fn linear(
        &self,
        site: &UpdateSite<'_>,
        weight: &Weight,
    ) -> Result<Option<(Lora, AdaptedModule)>, Error> {
        let (path, device) = (site.path, site.device);
        let Some(update) = self.linear.get(path) else {
            return Ok(None);
        };
        let dims = weight.dims();
        self.expect_widths(path, update.widths(), dims)?;
        let mut lora = Lora {
            lora_a: parameter(update.a.clone(), [update.rank, dims[1]], device),
            lora_b: parameter(update.b.clone(), [dims[0], update.rank], device),
            scale: update.scale,
            dropout: self.dropout,
            dropout_stream: site.number,
            dora: None,
        };
        if let Some(magnitude) = &update.magnitude {
            check_dora(path)?;
            // Without training the norms never change, and each decoded token would cost as much as they do.
            let norms = (!device.is_autodiff()).then(|| lora.row_norms(weight));
            lora.dora = Some(Dora {
                lora_magnitude_vector: parameter(magnitude.clone(), [dims[0]], device),
                norms,
            });
        }
        Ok(Some((lora, AdaptedModule::new(path, update))))
    }

    /// The updates of a layer's experts, if the adapter has any.
    pub(super) fn experts(
        &self,
        site: &UpdateSite<'_>,
        experts: &Experts,
    ) -> Result<Option<ExpertUpdates>, Error> {
        let [n_experts, inner, hidden] = experts.dims();
        let path = site.path;
        let fused = |fused: Fused| {
            let updates = self.fused.get(&(path.into(), fused))?;
            Some(updates.iter().collect::<Vec<_>>())
        };
        let (fused_gate_up, fused_down) = (fused(Fused::GateUp), fused(Fused::Down));
        let is_fused = fused_gate_up.is_some() || fused_down.is_some();
        let expert_ids = self.expert_ids(path, n_experts)?;
        if is_fused && !expert_ids.is_empty() {
            return Err(self.unfit(
                path,
                "one form of update for the experts of a layer".into(),
                "stacked updates and updates of single experts".into(),
            ));
        }
        let mut adapted = Vec::new();
        let ids = if is_fused {
            &(0..n_experts).collect()
        } else {
            &expert_ids
        };
        let own = experts.own_places(ids);
        let mut stacks = |name: &str, updates: Option<Vec<&WeightUpdate>>, dims: [usize; 2]| {
            let Some(updates) = updates else {
                return Ok::<_, Error>(None);
            };
            let module = format!("{path}.{name}");
            let (stacks, parameters) =
                self.stacks(&module, (&updates, own.clone()), dims, site.device)?;
            adapted.push(AdaptedModule {
                parameters,
                ..AdaptedModule::new(&module, updates[0])
            });
            Ok(Some(stacks))
        };
        let classic = |projection| self.classic(path, projection, &expert_ids);
        let [gate, up, down] = PROJECTIONS;
        let lora = ExpertsLora {
            gate_proj: stacks(gate, classic(gate), [inner, hidden])?,
            up_proj: stacks(up, classic(up), [inner, hidden])?,
            gate_up_proj: stacks("gate_up_proj", fused_gate_up, [2 * inner, hidden])?,
            down_proj: stacks(down, fused_down.or(classic(down)), [hidden, inner])?,
            is_fused,
            dropout: self.dropout,
            dropout_stream: site.number,
        };
        Ok((!adapted.is_empty()).then(|| ExpertUpdates {
            lora,
            subset: (!is_fused).then_some(expert_ids),
            adapted,
        }))
    }

    /// Some of the updates of experts as stacks, for a weight `[out, width]`; and the number of values of all.
    fn stacks(
        &self,
        module: &str,
        (updates, own): (&[&WeightUpdate], Range<usize>),
        [out, width]: [usize; 2],
        device: &Device,
    ) -> Result<(FactorStacks, usize), Error> {
        let first = updates[0];
        for update in updates {
            self.expect_widths(module, update.widths(), [out, width])?;
            if update.magnitude.is_some() {
                check_dora(module)?;
            }
            if (update.rank, update.scale) != (first.rank, first.scale) {
                let shown = |update: &WeightUpdate| {
                    format!("rank {} and scale {}", update.rank, update.scale)
                };
                let expected = format!("{} for all experts of a layer", shown(first));
                return Err(self.unfit(module, expected, shown(update)));
            }
        }
        let projection = module.rsplit('.').next().unwrap_or(module);
        let shared = self
            .share
            .map_or([false; 2], |share| share.factors(projection));
        let gather = |of: fn(&WeightUpdate) -> &Vec<f32>, is_shared: bool| {
            if !is_shared {
                let values = updates[own.clone()].iter().flat_map(|update| of(update));
                return Ok((values.copied().collect::<Vec<_>>(), own.len()));
            }
            match updates.iter().all(|update| of(update) == of(first)) {
                true => Ok((of(first).clone(), 1)),
                false => Err(self.unfit(
                    module,
                    "one factor for all experts, as moeforge.json says".into(),
                    "different ones".into(),
                )),
            }
        };
        let (a, n_a) = gather(|update| &update.a, shared[0])?;
        let (b, n_b) = gather(|update| &update.b, shared[1])?;
        let rank = first.rank;
        let all = shared.map(|is_shared| if is_shared { 1 } else { updates.len() });
        let parameters = rank * (all[0] * width + all[1] * out);
        let stacks = FactorStacks {
            lora_a: parameter(a, [n_a, rank, width], device),
            lora_b: parameter(b, [n_b, out, rank], device),
            scale: first.scale,
        };
        Ok((stacks, parameters))
    }

    /// The experts of a layer that have updates of their own: the same for every projection that has any.
    fn expert_ids(&self, path: &str, n_experts: usize) -> Result<Vec<usize>, Error> {
        let has = |expert: usize, projection: &str| {
            let module = format!("{path}.{expert}.{projection}");
            self.linear.contains_key(&module)
        };
        let mut all: Vec<usize> = Vec::new();
        for projection in PROJECTIONS {
            let expert_ids: Vec<usize> = (0..n_experts).filter(|e| has(*e, projection)).collect();
            if all.is_empty() {
                all = expert_ids;
            } else if !expert_ids.is_empty() && expert_ids != all {
                return Err(self.unfit(
                    &format!("{path}.{projection}"),
                    format!(
                        "updates of the {} experts that other projections update",
                        all.len()
                    ),
                    format!("updates of {}, or of others", expert_ids.len()),
                ));
            }
        }
        Ok(all)
    }

    /// The updates of a subset of experts in the classic dialect, if the projection has any.
    fn classic(
        &self,
        path: &str,
        projection: &str,
        expert_ids: &[usize],
    ) -> Option<Vec<&WeightUpdate>> {
        let update = |expert: &usize| self.linear.get(&format!("{path}.{expert}.{projection}"));
        let updates: Option<Vec<&WeightUpdate>> = expert_ids.iter().map(update).collect();
        updates.filter(|updates| !updates.is_empty())
    }
}

impl AdaptedModule {
    fn new(module: &str, update: &WeightUpdate) -> Self {
        let magnitude = update.magnitude.as_ref().map_or(0, Vec::len);
        Self {
            module: module.into(),
            rank: update.rank,
            alpha: update.alpha,
            parameters: update.a.len() + update.b.len() + magnitude,
        }
    }
}
