//! How a session joins other ranks.

use std::sync::Arc;

use kernels::device::is_gpu;
use model::ExpertRanks;
use parallel::World;

use super::ranks::{RankLayout, Ranks};
use crate::session::Session;
use crate::{Error, Result};

impl Session {
    /// Joins other ranks, to make a run together. Only the first one's run directory is kept; that of another has its
    /// metrics and nothing else. Returns the layout, nothing left open.
    ///
    /// # Errors
    /// If the micro-batches of a step cannot be shared out, or experts cannot as the layout says.
    pub fn join(&mut self, world: World, layout: RankLayout) -> Result<RankLayout> {
        let (ranks, train) = (world.ranks(), &self.recipe.train);
        if !train.accumulate.is_multiple_of(ranks) {
            return Err(Error::Rounds {
                ranks,
                accumulate: train.accumulate,
            });
        }
        let layout = layout.resolve(self, &world)?;
        let expert_ranks = layout.expert_ranks(&world);
        if let Some(expert_ranks) = &expert_ranks {
            let reference = self
                .reference
                .as_mut()
                .map(|reference| &mut reference.model);
            let models = [Some(&mut self.model), reference, self.start.as_mut()];
            for model in models.into_iter().flatten() {
                model.shard_experts(expert_ranks)?;
            }
        }
        self.ranks = Ranks::new(world, layout, expert_ranks, &self.model);
        Ok(layout)
    }

    /// Why ranks do not share out the experts that are trained, unless they may.
    pub fn why_experts_stay_whole(&self) -> Option<String> {
        obstacle_to_sharding(self).filter(|_| trains_experts(self))
    }
}

impl RankLayout {
    /// The layout of a session's ranks, nothing left open.
    fn resolve(self, session: &Session, world: &World) -> Result<Self> {
        let ranks = world.ranks();
        let refuse = |why: String| Err(Error::Layout(why));
        let obstacle = obstacle_to_sharding(session);
        let ep = match (self.ep, &obstacle) {
            (Some(ep), None) if ep > 1 => ep,
            (Some(ep), Some(why)) if ep > 1 => return refuse(format!("ep={ep}: {why}")),
            (None, None) if trains_experts(session) => ranks,
            _ => 1,
        };
        if !ranks.is_multiple_of(ep) {
            return refuse(format!(
                "ep={ep} does not divide the number of ranks, {ranks}; start as many with `mpirun -n`"
            ));
        }
        match self.of_experts_alone().filter(|_| ep == 1) {
            Some(key) => refuse(format!(
                "`{key}` is for ranks that share out experts, and here ep=1"
            )),
            None => Ok(self.with_ep(ep)),
        }
    }

    /// The ranks that share out experts, if any do.
    fn expert_ranks(self, world: &World) -> Option<Arc<ExpertRanks>> {
        let ep = self.ep.filter(|ep| *ep > 1)?;
        Some(Arc::new(ExpertRanks::new(
            world.clone(),
            ep,
            self.exchange(),
            self.wire(),
        )))
    }
}

/// Whether any expert is trained or updated.
fn trains_experts(session: &Session) -> bool {
    let parameters = session.model.parameters();
    (parameters.iter()).any(|parameter| parameter.name.contains(".mlp.experts."))
}

/// Why a session's experts cannot be shared out.
fn obstacle_to_sharding(session: &Session) -> Option<String> {
    let Some(moe) = &session.config().moe else {
        return Some("the model has no experts".into());
    };
    if session.update.share.is_some() {
        Some("experts share a factor (`lora.experts_share`, or the adapter's)".into())
    } else if moe.n_routed_experts < 2 {
        Some("the model has one expert".into())
    } else if is_gpu(&session.device()) {
        Some("experts on GPUs are not shared out yet; use --device cpu".into())
    } else if !session.recipe.eval.prompts.is_empty() {
        Some(
            "`eval.prompts` are answered by one rank, which has some of the experts; remove them"
                .into(),
        )
    } else {
        None
    }
}
