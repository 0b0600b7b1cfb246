//! How a session joins other ranks: what they share out is known before any weight is read.

use std::sync::Arc;

use burn::tensor::Device;
use kernels::device::is_gpu;
use model::adapt::Share;
use model::{AdapterWeights, ExpertRanks, ModelConfig};
use parallel::World;

use super::ranks::{JoinedRanks, RankLayout};
use crate::recipe::{Method, Recipe};
use crate::{Error, Result};

/// What decides whether ranks can share out experts.
pub(crate) struct Sharing<'a> {
    recipe: &'a Recipe,
    config: &'a ModelConfig,
    adapter: Option<&'a AdapterWeights>,
    device: &'a Device,
}

impl<'a> Sharing<'a> {
    pub(crate) fn new(
        recipe: &'a Recipe,
        config: &'a ModelConfig,
        adapter: Option<&'a AdapterWeights>,
        device: &'a Device,
    ) -> Self {
        Self {
            recipe,
            config,
            adapter,
            device,
        }
    }

    /// Joins other ranks, if there are any.
    ///
    /// # Errors
    /// If the micro-batches of a step cannot be shared out, or experts cannot as the layout says.
    pub(crate) fn join(&self, ranks: Option<(&World, RankLayout)>) -> Result<JoinedRanks> {
        let Some((world, layout)) = ranks else {
            return Ok(JoinedRanks::default());
        };
        let (ranks, accumulate) = (world.ranks(), self.recipe.train.accumulate);
        if !accumulate.is_multiple_of(ranks) {
            return Err(Error::Rounds { ranks, accumulate });
        }
        let layout = self.resolve(layout, ranks)?;
        let expert_ranks =
            |ep| ExpertRanks::new(world.clone(), ep, layout.exchange(), layout.wire());
        Ok(JoinedRanks {
            world: world.clone(),
            layout,
            experts: layout
                .ep
                .filter(|ep| *ep > 1)
                .map(expert_ranks)
                .map(Arc::new),
            why_whole: self.obstacle().filter(|_| self.trains_experts()),
        })
    }

    /// A layout, nothing left open.
    fn resolve(&self, layout: RankLayout, ranks: usize) -> Result<RankLayout> {
        let refuse = |why: String| Err(Error::Layout(why));
        if let Some(dp) = layout.dp.filter(|dp| *dp != ranks) {
            return refuse(format!(
                "dp={dp}: expected the number of ranks, {ranks}; start as many with `mpirun -n`"
            ));
        }
        let obstacle = self.obstacle();
        let ep = match (layout.ep, &obstacle) {
            (Some(ep), None) if ep > 1 => ep,
            (Some(ep), Some(why)) if ep > 1 => return refuse(format!("ep={ep}: {why}")),
            (None, None) if self.trains_experts() => ranks,
            _ => 1,
        };
        if !ranks.is_multiple_of(ep) {
            return refuse(format!(
                "ep={ep} does not divide the number of ranks, {ranks}; start as many with `mpirun -n`"
            ));
        }
        match layout.of_experts_alone().filter(|_| ep == 1) {
            Some(key) => refuse(format!(
                "`{key}` is for ranks that share out experts, and here ep=1"
            )),
            None => Ok(layout.with(ranks, ep)),
        }
    }

    /// Whether any expert is trained or updated.
    fn trains_experts(&self) -> bool {
        match (self.recipe.train.method, self.adapter) {
            (Method::Full, _) => self.recipe.training().trains_experts(self.config),
            (Method::Lora, None) => self.recipe.lora_config().adapts_experts(self.config),
            (Method::Lora, Some(adapter)) => {
                let modules = adapter.modules();
                modules
                    .iter()
                    .any(|module| module.contains(".mlp.experts."))
            }
        }
    }

    /// The factors that the experts of a layer share.
    fn share(&self) -> Option<Share> {
        match (self.recipe.train.method, self.adapter) {
            (Method::Full, _) => None,
            (Method::Lora, None) => self.recipe.lora.experts_share,
            (Method::Lora, Some(adapter)) => adapter.share(),
        }
    }

    /// Why experts cannot be shared out.
    fn obstacle(&self) -> Option<String> {
        let Some(moe) = &self.config.moe else {
            return Some("the model has no experts".into());
        };
        if self.share().is_some() {
            Some("experts share a factor (`lora.experts_share`, or the adapter's)".into())
        } else if moe.n_routed_experts < 2 {
            Some("the model has one expert".into())
        } else if is_gpu(self.device) {
            Some("experts on GPUs are not shared out yet; use --device cpu".into())
        } else if !self.recipe.eval.prompts.is_empty() {
            Some(
                "`eval.prompts` are answered by one rank, which has some of the experts; remove them"
                    .into(),
            )
        } else if !self.recipe.eval.tasks.is_empty() {
            Some(
                "`eval.tasks` are asked by one rank, which has some of the experts; remove them"
                    .into(),
            )
        } else {
            None
        }
    }
}
