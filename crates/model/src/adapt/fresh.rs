//! Fresh low-rank updates, as a config chooses them.

use std::ops::Range;

use burn::module::{Param, ParamId};
use burn::tensor::Device;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::lora_config::LoraConfig;
use super::update::{AdaptedModule, ExpertUpdates, UpdateSite, check_dora};
use crate::Error;
use crate::keys::{PROJECTIONS, seed_for};
use crate::load::normal;
use crate::modules::experts::{Experts, ExpertsLora, FactorStacks};
use crate::modules::linear::Weight;
use crate::modules::lora::{Dora, Lora, parameter};

impl LoraConfig {
    /// The fresh update of a linear layer, if the config adapts it.
    pub(super) fn linear(
        &self,
        site: &UpdateSite<'_>,
        weight: &Weight,
    ) -> Result<Option<(Lora, AdaptedModule)>, Error> {
        let (path, device) = (site.path, site.device);
        if !self.adapts(path) {
            return Ok(None);
        }
        let [out, width] = weight.dims();
        let (rank, alpha) = (self.rank_of(path), self.alpha_of(path));
        let a = uniform(self.seed, path, 0..rank * width, width);
        let mut lora = Lora {
            lora_a: parameter(a, [rank, width], device),
            lora_b: parameter(vec![0.0; out * rank], [out, rank], device),
            scale: self.scaling.scale(alpha, rank),
            dropout: self.dropout,
            dropout_stream: site.number,
            dora: None,
        };
        if self.use_dora {
            check_dora(path)?;
            let norms = lora.row_norms(weight);
            let magnitudes = norms.set_require_grad(device.is_autodiff());
            lora.dora = Some(Dora {
                lora_magnitude_vector: Param::initialized(ParamId::new(), magnitudes),
                norms: None,
            });
        }
        let adapted = AdaptedModule {
            module: path.into(),
            rank,
            alpha,
            parameters: rank * (width + out) + if self.use_dora { out } else { 0 },
        };
        Ok(Some((lora, adapted)))
    }

    /// The fresh update of the embedding, if the config adapts it: as PEFT makes it, normal by hidden width, zero by token.
    pub(super) fn embedding(
        &self,
        site: &UpdateSite<'_>,
        weight: &Weight,
    ) -> Result<Option<(Lora, AdaptedModule)>, Error> {
        let update = self.linear(site, weight)?;
        Ok(update.map(|(lora, module)| {
            let [rank, width] = lora.lora_a.val().dims();
            let a = normal(self.seed, site.path, rank * width, 1.0);
            let lora_a = parameter(a, [rank, width], site.device);
            (Lora { lora_a, ..lora }, module)
        }))
    }

    /// The fresh updates of a layer's experts, if the config adapts any.
    pub(super) fn experts(
        &self,
        site: &UpdateSite<'_>,
        experts: &Experts,
    ) -> Result<Option<ExpertUpdates>, Error> {
        let [n_experts, inner, hidden] = experts.dims();
        let Some(by_projection) = self.expert_ids(site.path, n_experts)? else {
            return Ok(None);
        };
        if self.use_dora {
            check_dora(site.path)?;
        }
        let mut adapted = Vec::new();
        let mut stacks = |index: usize, widths: [usize; 2]| {
            let ids = &by_projection[index];
            (!ids.is_empty()).then(|| {
                let path = format!("{}.{}", site.path, PROJECTIONS[index]);
                let places = (experts.own_places(ids), ids.len());
                let (stacks, module) = self.stacks(&path, places, widths, site.device);
                adapted.push(module);
                stacks
            })
        };
        let lora = ExpertsLora {
            gate_proj: stacks(0, [hidden, inner]),
            up_proj: stacks(1, [hidden, inner]),
            gate_up_proj: None,
            is_fused: false,
            down_proj: stacks(2, [inner, hidden]),
            dropout: self.dropout,
            dropout_stream: site.number,
        };
        Ok(Some(ExpertUpdates {
            lora,
            subset: by_projection.into_iter().find(|ids| !ids.is_empty()),
            adapted,
        }))
    }

    /// The adapted experts of a layer, by projection: the same ones for every projection that is adapted; none if none are.
    fn expert_ids(&self, path: &str, n_experts: usize) -> Result<Option<[Vec<usize>; 3]>, Error> {
        let by_projection =
            PROJECTIONS.map(|projection| self.adapted_experts(path, projection, n_experts));
        let mut adapted = by_projection.iter().filter(|ids| !ids.is_empty());
        let Some(expert_ids) = adapted.next() else {
            return Ok(None);
        };
        if let Some(other) = adapted.find(|other| *other != expert_ids) {
            return Err(Error::Unsupported(format!(
                "`{path}`: `lora.target` and `lora.exclude` choose {} experts for one projection and {} for another; \
                 choose the same ones",
                expert_ids.len(),
                other.len()
            )));
        }
        Ok(Some(by_projection))
    }

    /// Fresh factors of one projection of some of `n` experts, of an input and an output width.
    fn stacks(
        &self,
        path: &str,
        (own, n): (Range<usize>, usize),
        [width, out]: [usize; 2],
        device: &Device,
    ) -> (FactorStacks, AdaptedModule) {
        let (rank, alpha) = (self.rank_of(path), self.alpha_of(path));
        let projection = path.rsplit('.').next().unwrap_or(path);
        let shared = self.experts_share.map(|share| share.factors(projection));
        let shared = shared.unwrap_or_default();
        let places =
            |all: Range<usize>| shared.map(|is_shared| if is_shared { 0..1 } else { all.clone() });
        let [own_a, own_b] = places(own);
        let size = rank * width;
        let a = uniform(self.seed, path, own_a.start * size..own_a.end * size, width);
        let n_b = own_b.len();
        let stacks = FactorStacks {
            lora_a: parameter(a, [own_a.len(), rank, width], device),
            lora_b: parameter(vec![0.0; n_b * out * rank], [n_b, out, rank], device),
            scale: self.scaling.scale(alpha, rank),
        };
        let [n_a, n_b] = places(0..n).map(|all| all.len());
        let adapted = AdaptedModule {
            module: path.into(),
            rank,
            alpha,
            parameters: rank * (n_a * width + n_b * out),
        };
        (stacks, adapted)
    }
}

/// Some of the values of PEFT's initialization of `a`: uniform within `±1/√in` (Kaiming with a = √5).
fn uniform(seed: u64, path: &str, values: Range<usize>, width: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed_for(seed, path));
    // A value is a word.
    random.set_word_pos(values.start as u128);
    let bound = 1.0 / (width as f32).sqrt();
    values
        .map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 23) as f32 * bound - bound)
        .collect()
}
