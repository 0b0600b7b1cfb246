//! How a session joins other ranks: what they share out is known before any weight is read.

use std::sync::Arc;

use burn::tensor::Device;
use kernels::device::is_gpu;
use model::adapt::Share;
use model::{AdapterWeights, ExpertRanks, ModelConfig};
use parallel::World;

use super::ranks::RankLayout;
use crate::open::lora_config;
use crate::recipe::{Method, Recipe};
use crate::session::Session;
use crate::{Error, Result};

/// The ranks of a run, and how they share it out.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    pub(crate) world: World,
    /// Nothing is left open.
    pub(crate) layout: RankLayout,
    /// Those that share out experts, if any do.
    pub(crate) experts: Option<Arc<ExpertRanks>>,
    /// Why trained experts are not shared out, unless they may be.
    pub(crate) why_whole: Option<String>,
}

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
    pub(crate) fn join(&self, ranks: Option<(&World, RankLayout)>) -> Result<Joined> {
        let Some((world, layout)) = ranks else {
            return Ok(Joined::default());
        };
        let (ranks, accumulate) = (world.ranks(), self.recipe.train.accumulate);
        if !accumulate.is_multiple_of(ranks) {
            return Err(Error::Rounds { ranks, accumulate });
        }
        let layout = self.resolve(layout, ranks)?;
        let expert_ranks =
            |ep| ExpertRanks::new(world.clone(), ep, layout.exchange(), layout.wire());
        Ok(Joined {
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
            None => Ok(layout.with_ep(ep)),
        }
    }

    /// Whether any expert is trained or updated.
    fn trains_experts(&self) -> bool {
        match (self.recipe.train.method, self.adapter) {
            (Method::Full, _) => self.recipe.training().trains_experts(self.config),
            (Method::Lora, None) => lora_config(self.recipe).adapts_experts(self.config),
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
        } else {
            None
        }
    }
}

impl Session {
    /// How ranks share the run out, nothing left open.
    pub fn layout(&self) -> RankLayout {
        self.ranks.layout
    }

    /// Why ranks do not share out the experts that are trained, unless they may.
    pub fn why_experts_stay_whole(&self) -> Option<&str> {
        self.ranks.why_whole.as_deref()
    }
}
