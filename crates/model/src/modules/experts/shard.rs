//! A rank's share of a layer's experts, if ranks share them out.

use std::ops::Range;
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::Tensor;
use kernels::{ExpertBank, Matrix};

use super::{ExpertPart, ExpertWeights, Experts, FactorStacks, PartWeights, routing};
use crate::Error;
use crate::forward::context::ForwardContext;
use crate::forward::exchange::{ExpertRanks, RunningExperts, ShardedExperts};
use crate::forward::routing::Routed;

/// The share of a layer's experts that a rank holds.
#[derive(Clone, Debug)]
pub(crate) struct ExpertShard {
    /// Number of experts of the layer, on all ranks together.
    pub(crate) n_experts: usize,
    ranks: Arc<ExpertRanks>,
    /// The layer, for messages.
    layer_idx: usize,
    /// The share of each of the layer's parts.
    parts: Vec<ShardPart>,
}

/// The share of the experts that one kernel serves.
#[derive(Clone, Debug)]
struct ShardPart {
    /// The share of each rank of a group.
    ranges: Vec<Range<usize>>,
    /// This rank's, if they are frozen.
    bank: Option<Arc<ExpertBank>>,
}

impl Experts {
    /// Keeps this rank's share. Frozen experts stay mapped, and cost nothing unless they are read.
    ///
    /// # Errors
    /// If experts share a factor.
    pub(crate) fn shard(
        &mut self,
        ranks: &Arc<ExpertRanks>,
        layer_idx: usize,
    ) -> Result<(), Error> {
        let n_experts = self.dims()[0];
        let all = ranks.ranges(n_experts);
        let sharded = |part: ExpertPart<'_>| {
            let place_of = |expert: usize| match part.ids {
                Some(ids) => ids.partition_point(|id| *id < expert),
                None => expert,
            };
            let ranges = all.iter().map(|of| place_of(of.start)..place_of(of.end));
            let ranges: Vec<Range<usize>> = ranges.collect();
            let bank = match part.weights {
                PartWeights::Trained(_) => None,
                PartWeights::Updated(bank) | PartWeights::Plain(bank) => {
                    Some(share_of(bank, ranges[ranks.place()].clone()))
                }
            };
            ShardPart { ranges, bank }
        };
        let parts: Vec<ShardPart> = self.parts().into_iter().map(sharded).collect();
        let (n_updated, own) = (self.n_updated(), parts[0].ranges[ranks.place()].clone());
        for (name, stack) in self.stacks_mut() {
            let [n, rows, cols] = stack.val().dims();
            if n != n_updated {
                return Err(Error::Unsupported(format!(
                    "`model.layers.{layer_idx}.mlp.experts.{name}`: its experts share one factor, which ranks that share out \
                     experts (ep = {}) do not train; use ep = 1",
                    ranks.ep()
                )));
            }
            replace(stack, |values| {
                values.slice([own.clone(), 0..rows, 0..cols])
            });
        }
        self.shard = Some(ExpertShard {
            n_experts,
            ranks: Arc::clone(ranks),
            layer_idx,
            parts,
        });
        Ok(())
    }

    /// Takes all experts back. `values` gives those of a stack, by its path in this module.
    pub(crate) fn unshard(&mut self, values: &mut dyn FnMut(&str) -> Option<Tensor<1>>) {
        self.shard = None;
        for (name, stack) in self.stacks_mut() {
            let [_, rows, cols] = stack.val().dims();
            if let Some(values) = values(&name) {
                let n = values.dims()[0] / (rows * cols).max(1);
                replace(stack, |_| values.reshape([n, rows, cols]));
            }
        }
    }

    /// The stacks of which this rank holds a share, by their paths in this module, and the share of each rank of its group.
    pub(crate) fn stack_shards(&self) -> Vec<(String, Vec<Range<usize>>, Tensor<3>)> {
        let Some(shard) = &self.shard else {
            return vec![];
        };
        let ranges = &shard.parts[0].ranges;
        let mut shell = self.clone();
        let stacks = shell.stacks_mut().into_iter();
        stacks
            .map(|(name, stack)| (name, ranges.clone(), stack.val()))
            .collect()
    }

    /// Sends rows to the ranks that hold their experts, if ranks share them out; else none.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    pub(crate) fn send(
        &self,
        x: &Tensor<2>,
        routed: &Routed,
        ctx: &ForwardContext<'_>,
    ) -> Option<Vec<RunningExperts>> {
        let shard = self.shard.as_ref()?;
        let parts = self.parts().into_iter().zip(&shard.parts).enumerate();
        let send = |(i, (part, share)): (usize, (ExpertPart<'_>, &ShardPart))| {
            let sharded = ShardedExperts {
                ranks: &shard.ranks,
                ranges: &share.ranges,
                name: format!("experts of layer {}, part {i}", shard.layer_idx),
            };
            let routing = routing(routed, part.ids, shard.n_experts);
            RunningExperts::send(sharded, (x.clone(), routed), &routing, ctx.dropout_seed)
        };
        Some(parts.map(send).collect())
    }

    /// Runs this rank's experts over the rows that were sent to them.
    pub(crate) fn serve(&self, running: &mut [RunningExperts], ctx: &ForwardContext<'_>) {
        let shares = self.shard.iter().flat_map(|shard| &shard.parts);
        for ((part, share), running) in self.parts().into_iter().zip(shares).zip(running) {
            let weights = match (part.weights, &share.bank) {
                (PartWeights::Updated(_), Some(bank)) => PartWeights::Updated(bank),
                (PartWeights::Plain(_), Some(bank)) => PartWeights::Plain(bank),
                (weights, _) => weights,
            };
            running
                .serve(|rows| self.sum_of(weights, rows.x, rows.routing, rows.dropout_seed, ctx));
        }
    }

    /// The weighted sum of every token's experts, from what came back.
    ///
    /// # Shapes
    /// - returns: `[tokens, hidden_size]`
    pub(crate) fn finish(
        &self,
        running: Vec<RunningExperts>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let sums = running.into_iter().map(|running| {
            let (y, exchanged) = running.finish();
            ctx.exchanged.borrow_mut().extend(exchanged);
            y
        });
        sums.reduce(|sum, y| sum + y).expect("a layer has experts")
    }

    /// Trained or updated stacks, by their paths.
    fn stacks_mut(&mut self) -> Vec<(String, &mut Param<Tensor<3>>)> {
        let stacks = match &mut self.weights {
            ExpertWeights::Frozen(_) => None,
            ExpertWeights::Trained(stacks) => Some(("weights", stacks)),
            ExpertWeights::Partial(partial) => Some(("weights.trained", &mut partial.trained)),
        };
        let mut found = Vec::new();
        if let Some((path, stacks)) = stacks {
            found.push((format!("{path}.gate_proj"), &mut stacks.gate_proj));
            found.push((format!("{path}.up_proj"), &mut stacks.up_proj));
            found.push((format!("{path}.down_proj"), &mut stacks.down_proj));
        }
        if let Some(lora) = &mut self.lora {
            let factors = [
                ("gate_proj", &mut lora.gate_proj),
                ("up_proj", &mut lora.up_proj),
                ("gate_up_proj", &mut lora.gate_up_proj),
                ("down_proj", &mut lora.down_proj),
            ];
            for (name, stacks) in factors {
                let Some(FactorStacks { lora_a, lora_b, .. }) = stacks else {
                    continue;
                };
                found.push((format!("lora.{name}.lora_a"), lora_a));
                found.push((format!("lora.{name}.lora_b"), lora_b));
            }
        }
        found
    }
}

/// Some experts of a bank.
fn share_of(bank: &ExpertBank, experts: Range<usize>) -> Arc<ExpertBank> {
    let of = |list: &[Matrix]| list[experts.clone()].to_vec();
    let bank = ExpertBank::new(of(&bank.gate), of(&bank.up), of(&bank.down));
    Arc::new(bank)
}

/// Replaces the values of a parameter by others, trained or not as they were.
fn replace(stack: &mut Param<Tensor<3>>, change: impl FnOnce(Tensor<3>) -> Tensor<3>) {
    let old = stack.val();
    let is_trained = old.is_require_grad();
    let values = if old.device().is_autodiff() {
        Tensor::from_inner(change(old.inner()))
    } else {
        change(old)
    };
    *stack = Param::initialized(stack.id, values.set_require_grad(is_trained));
}
