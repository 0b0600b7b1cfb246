//! A rank's share of a layer's experts, if ranks share them out.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use kernels::fp8::Scales;
use kernels::{Compute, ExpertBank, Matrix};

use super::{ExpertPart, Experts, PartWeights, routing};
use crate::forward::context::ForwardContext;
use crate::forward::exchange::{ExpertRanks, RunningExperts, ShardedExperts};
use crate::forward::routing::Routed;
use crate::precision::PrecisionClass;

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

impl ExpertShard {
    /// Which of the trained or updated experts each rank of a group has.
    pub(crate) fn updated(&self) -> &[Range<usize>] {
        &self.parts[0].ranges
    }
}

impl Experts {
    /// Serves this rank's share of a layer's experts from now on; stacks are those of the share already. Frozen experts stay
    /// mapped, and cost nothing unless they are read.
    pub(crate) fn shard(&mut self, ranks: &Arc<ExpertRanks>, layer_idx: usize, n_experts: usize) {
        let sharded = |part: ExpertPart<'_>| {
            let ranges = ranks.places(n_experts, part.ids.map(Vec::as_slice));
            let bank = match part.weights {
                PartWeights::Trained(_) => None,
                PartWeights::Updated(bank) | PartWeights::Plain(bank) => {
                    Some(share_of(bank, ranges[ranks.place()].clone()))
                }
            };
            ShardPart { ranges, bank }
        };
        self.shard = Some(ExpertShard {
            n_experts,
            ranks: Arc::clone(ranks),
            layer_idx,
            parts: self.parts().into_iter().map(sharded).collect(),
        });
    }

    /// The places of this rank's experts among some of a layer's, ascending.
    pub(crate) fn own_places(&self, expert_ids: &[usize]) -> Range<usize> {
        match &self.shard {
            Some(shard) => shard.ranks.own_places(shard.n_experts, Some(expert_ids)),
            None => 0..expert_ids.len(),
        }
    }

    /// Shares out the parts that the layer has by now.
    pub(super) fn shard_again(&mut self) {
        if let Some(ExpertShard {
            n_experts,
            ranks,
            layer_idx,
            ..
        }) = self.shard.take()
        {
            self.shard(&ranks, layer_idx, n_experts);
        }
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
                scales: self.scales_of_rows(part.weights, &shard.ranks, ctx),
            };
            let routing = routing(routed, part.ids, shard.n_experts);
            RunningExperts::send(sharded, (x.clone(), routed), &routing, ctx.dropout_seed)
        };
        Some(parts.map(send).collect())
    }

    /// How rows are rounded on their way: as all that reads them does. Low-rank updates read them unrounded; gradients of
    /// trained weights round columns, so they get rows that are rounded already only on a wire that rounds anyway.
    fn scales_of_rows(
        &self,
        weights: PartWeights<'_>,
        ranks: &ExpertRanks,
        ctx: &ForwardContext<'_>,
    ) -> Option<Scales> {
        let may_round = match weights {
            PartWeights::Plain(_) => true,
            PartWeights::Updated(_) => self.lora.is_none(),
            PartWeights::Trained(_) => ranks.rounds(),
        };
        match ctx.compute_of(PrecisionClass::Experts) {
            Compute::Fp8(kind) if may_round => Some(kind),
            _ => None,
        }
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
}

/// Some experts of a bank.
fn share_of(bank: &ExpertBank, experts: Range<usize>) -> Arc<ExpertBank> {
    let of = |list: &[Matrix]| list[experts.clone()].to_vec();
    let bank = ExpertBank::new(of(&bank.gate), of(&bank.up), of(&bank.down));
    Arc::new(bank)
}
