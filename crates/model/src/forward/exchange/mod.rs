//! Experts on several ranks: rows go to the ranks that hold their experts, and what the experts make of them comes back.
//!
//! Ranks stand in groups of `ep`, and each group holds all experts: a rank a contiguous range of every layer's. Each rank
//! of a group computes a micro-batch of its own, and at a mixture layer serves the others'. A rank runs its experts once for
//! each micro-batch, so that sums, gradients and random values are those of a rank that has all experts: with a row for each
//! slot there and back, every bit is. No exchange runs inside autodiff: the graph ends at the rows, on both sides, and
//! [`ExchangedExperts`] carries gradients across.

mod rows;
#[cfg(test)]
mod tests;

use std::ops::Range;

use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use kernels::device::{read, read_ints};
use kernels::fp8::Scales;
use kernels::{Routing, SuppliedGradients};
use parallel::{MessageReader, MessageWriter, Posted, World};

use self::rows::{OutgoingRows, Received, Sent, SentPlan, add_rows};
use super::routing::Routed;

/// What travels between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExchangeKind {
    /// A row for each token and expert. Sums are made at home in the order of experts: the bits of one rank.
    Slots,
    /// A row for each token and rank, and their experts' sum back: fewer bytes, and another order of sums.
    #[default]
    Rows,
}

/// The format in which sums come back, and gradients of rows travel. Weights and their gradients travel in f32. Rows go out in
/// f32 too, or in E4M3 where products in FP8 are all that reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowWire {
    /// As they are.
    #[default]
    F32,
    /// Rounded, for links that are slow. Rows for trained experts in FP8 go out in E4M3 then.
    Bf16,
}

/// The ranks that share out the experts of every layer.
#[derive(Clone, Debug)]
pub struct ExpertRanks {
    world: World,
    ep: usize,
    kind: ExchangeKind,
    wire: RowWire,
}

impl ExpertRanks {
    /// Groups of `ep` ranks.
    ///
    /// # Panics
    /// If `ep` does not divide the ranks.
    pub fn new(world: World, ep: usize, kind: ExchangeKind, wire: RowWire) -> Self {
        assert!(
            ep > 0 && world.ranks().is_multiple_of(ep),
            "ep = {ep} of {} ranks",
            world.ranks()
        );
        Self {
            world,
            ep,
            kind,
            wire,
        }
    }

    /// Number of ranks in a group.
    pub fn ep(&self) -> usize {
        self.ep
    }

    /// This rank's place in its group.
    pub fn place(&self) -> usize {
        self.world.rank() % self.ep
    }

    /// Whether sums and gradients are rounded on their way.
    pub(crate) fn rounds(&self) -> bool {
        self.wire != RowWire::F32
    }

    /// The experts of each rank of a group.
    pub(crate) fn ranges(&self, experts: usize) -> Vec<Range<usize>> {
        let first = |place: usize| place * experts / self.ep;
        (0..self.ep)
            .map(|place| first(place)..first(place + 1))
            .collect()
    }

    /// The places of each rank's experts among some of a layer's `experts`, ascending; among all without `ids`.
    pub(crate) fn places(&self, experts: usize, ids: Option<&[usize]>) -> Vec<Range<usize>> {
        let place_of = |expert: usize| match ids {
            Some(ids) => ids.partition_point(|id| *id < expert),
            None => expert,
        };
        let ranges = self.ranges(experts).into_iter();
        ranges
            .map(|of| place_of(of.start)..place_of(of.end))
            .collect()
    }

    /// [`Self::places`] of this rank.
    pub(crate) fn own_places(&self, experts: usize, ids: Option<&[usize]>) -> Range<usize> {
        self.places(experts, ids).swap_remove(self.place())
    }

    /// Sends a message to each rank of this one's group.
    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Posted {
        let mut all = vec![Vec::new(); self.world.ranks()];
        all.splice(self.group(), messages);
        self.world.post(name, all)
    }

    /// The messages that came from the group.
    ///
    /// # Panics
    /// If ranks lose each other: an engine that knows how to leave the process has left it before.
    fn wait(&self, posted: Option<Posted>) -> Vec<Vec<u8>> {
        let posted = posted.expect("messages are on their way");
        let mut all = posted.wait().unwrap_or_else(|lost| panic!("{lost}"));
        all.drain(self.group()).collect()
    }

    /// The ranks of this one's group.
    fn group(&self) -> Range<usize> {
        let first = self.world.rank() - self.place();
        first..first + self.ep
    }
}

/// The rows of one micro-batch for this rank's experts, and their routing.
pub(crate) struct ServedRows {
    /// `[rows, hidden_size]`.
    pub(crate) x: Tensor<2>,
    pub(crate) routing: Routing,
    /// Of the micro-batch.
    pub(crate) dropout_seed: Option<u64>,
}

/// Some of a layer's experts, which one kernel serves, and where each rank of a group has its own of them.
pub(crate) struct ShardedExperts<'a> {
    pub(crate) ranks: &'a ExpertRanks,
    /// Which of them each rank holds.
    pub(crate) ranges: &'a [Range<usize>],
    /// Layer and part, for messages.
    pub(crate) name: String,
    /// The scales of the rows, if all that reads them are products in FP8.
    pub(crate) scales: Option<Scales>,
}

/// A micro-batch's experts. They run in three turns, so that something else can be computed while rows travel: rows are sent
/// when this is made, then [`Self::serve`], then [`Self::finish`].
#[derive(Debug)]
pub(crate) struct RunningExperts {
    x: Tensor<2>,
    weights: Tensor<2>,
    n_own: usize,
    run: ExchangedExperts,
}

/// A micro-batch's experts in a pass that is differentiated. The backward pass has three turns too: [`Self::send`],
/// [`Self::serve`], [`Self::finish`].
#[derive(Debug)]
pub struct ExchangedExperts {
    ranks: ExpertRanks,
    name: String,
    /// `[tokens, hidden_size]` and the number of slots of a token.
    shape: [usize; 3],
    sent: Vec<Sent>,
    /// What this rank has run for each of its group: inputs, weights and outputs, with the graph between them. None without
    /// experts.
    served: Vec<Option<[Tensor<2>; 3]>>,
    gradients: SuppliedGradients,
    posted: Option<Posted>,
}

impl RunningExperts {
    /// Sends a micro-batch's rows.
    ///
    /// # Shapes
    /// - `x`: `[tokens, hidden_size]`
    pub(crate) fn send(
        of: ShardedExperts<'_>,
        (x, routed): (Tensor<2>, &Routed),
        routing: &Routing,
        dropout_seed: Option<u64>,
    ) -> Self {
        let ([tokens, hidden], top_k) = (x.dims(), routed.weights.dims()[1]);
        let plan = SentPlan {
            top_k,
            tokens,
            order: ints(&routing.order),
            offsets: ints(&routing.offsets),
            is_recomputed: x.is_tracked(),
        };
        let sent: Vec<Sent> = (of.ranges.iter())
            .map(|range| plan.rows(range.clone(), of.ranks.kind))
            .collect();
        let rows = OutgoingRows::new(read(x.clone()), [tokens, hidden], of.scales);
        let weights = read(routed.weights.clone());
        let messages = (sent.iter()).map(|sent| sent.message(&rows, &weights, dropout_seed));
        let posted = (of.ranks).post(&format!("rows of {}", of.name), messages.collect());
        Self {
            x,
            weights: routed.weights.clone(),
            n_own: of.ranges[of.ranks.place()].len(),
            run: ExchangedExperts {
                ranks: of.ranks.clone(),
                name: of.name,
                shape: [tokens, hidden, top_k],
                sent,
                served: Vec::new(),
                gradients: SuppliedGradients::default(),
                posted: Some(posted),
            },
        }
    }

    /// Runs this rank's experts over the rows that came, with `run`, and sends the sums.
    ///
    /// # Panics
    /// If ranks lose each other.
    pub(crate) fn serve(&mut self, run: impl Fn(ServedRows) -> Tensor<2>) {
        let (ranks, [_, hidden, _]) = (&self.run.ranks, self.run.shape);
        let messages = ranks.wait(self.run.posted.take()).into_iter();
        let served = messages.map(|message| {
            let received = Received::read(&message, hidden).expect("the ranks run one program");
            received.serve(self.n_own, hidden, &self.x.device(), &run)
        });
        let served: Vec<Option<[Tensor<2>; 3]>> = served.collect();
        let replies = (served.iter()).map(|served| {
            let mut reply = MessageWriter::default();
            if let Some([.., y]) = served {
                ranks.wire.write(&mut reply, &read(y.clone()));
            }
            reply.finish()
        });
        let posted = ranks.post(&format!("sums of {}", self.run.name), replies.collect());
        self.run.posted = Some(posted);
        self.run.served = served;
    }

    /// The weighted sum of every token's experts, `[tokens, hidden_size]`; and what a backward pass needs, if there will be
    /// one.
    ///
    /// # Panics
    /// If ranks lose each other.
    pub(crate) fn finish(self) -> (Tensor<2>, Option<ExchangedExperts>) {
        let Self {
            x,
            weights,
            mut run,
            ..
        } = self;
        let ([tokens, hidden, _], device) = (run.shape, x.device());
        let replies = run.ranks.wait(run.posted.take());
        let (sum, _) = add_rows(&run.sent, &replies, tokens * hidden, run.ranks.wire);
        let y = Tensor::from_data(TensorData::new(sum, [tokens, hidden]), &device);
        if !device.is_autodiff() {
            return (y, None);
        }
        let y = kernels::computed_elsewhere(x, weights, y, run.gradients.clone());
        (y, Some(run))
    }
}

impl ExchangedExperts {
    /// Sends the gradient of the sum, `[tokens, hidden_size]` and without autodiff, to the experts, unless it is sent.
    pub(crate) fn send(&mut self, dy: &Tensor<2>) {
        if self.posted.is_some() {
            return;
        }
        let (values, [tokens, ..]) = (read(dy.clone()), self.shape);
        let messages = (self.sent.iter()).map(|sent| {
            let mut message = MessageWriter::default();
            self.ranks
                .wire
                .write(&mut message, &sent.gather(&values, tokens));
            message.finish()
        });
        let name = format!("gradients of {}", self.name);
        self.posted = Some(self.ranks.post(&name, messages.collect()));
    }

    /// Differentiates what this rank has run, and sends the gradients of rows and weights. `take` takes the gradients of this
    /// rank's experts, of one micro-batch after another.
    ///
    /// # Panics
    /// If ranks lose each other.
    pub(crate) fn serve(&mut self, mut take: impl FnMut(&mut Gradients)) {
        let messages = self.ranks.wait(self.posted.take()).into_iter();
        let (served, wire) = (std::mem::take(&mut self.served), self.ranks.wire);
        let replies = messages.zip(served).map(|(message, run)| {
            let Some([x, weights, y]) = run else {
                return Vec::new();
            };
            let values = wire.read(&mut MessageReader::new(&message));
            let values = values.expect("the ranks run one program");
            let dy = Tensor::from_data(TensorData::new(values, y.dims()), &y.device());
            // The gradient of this sum by y is exactly dy.
            let mut found = (y * dy).sum().backward();
            let [dx, dweights] = [x, weights].map(|of| {
                let gradient = of.grad(&found);
                gradient.unwrap_or_else(|| of.inner().zeros_like())
            });
            take(&mut found);
            let mut reply = MessageWriter::default();
            wire.write(&mut reply, &read(dx));
            reply.values(&read(dweights));
            reply.finish()
        });
        let name = format!("gradients of rows of {}", self.name);
        self.posted = Some(self.ranks.post(&name, replies.collect()));
    }

    /// Puts the gradients of rows and weights where the layer's graph takes them.
    ///
    /// # Panics
    /// If ranks lose each other.
    pub(crate) fn finish(mut self) {
        let [tokens, hidden, top_k] = self.shape;
        let replies = self.ranks.wait(self.posted.take());
        let (dx, rest) = add_rows(&self.sent, &replies, tokens * hidden, self.ranks.wire);
        let mut dweights = vec![0.0; tokens * top_k];
        for (sent, mut rest) in self.sent.iter().zip(rest) {
            if sent.tokens.is_empty() {
                continue;
            }
            let values = rest.values().expect("the ranks run one program");
            for (slot, value) in sent.slots.iter().zip(values) {
                if let Some(slot) = slot {
                    dweights[*slot] = value;
                }
            }
        }
        self.gradients.supply(
            TensorData::new(dx, [tokens, hidden]),
            TensorData::new(dweights, [tokens, top_k]),
        );
    }
}

/// The routing to the first `n` experts; what has others is served elsewhere.
pub(crate) fn first_experts(ids: Tensor<2, Int>, weights: Tensor<2>, n: usize) -> Routing {
    // All others are one more expert. Its slots come last and are left out.
    let device = weights.device();
    let (order, offsets) = kernels::dispatch(ids, n + 1);
    Routing {
        weights,
        order,
        offsets: offsets.select(0, Tensor::arange(0..n as i64 + 1, &device)),
        part: None,
    }
}

fn ints(values: &Tensor<1, Int>) -> Vec<usize> {
    let values = read_ints(values.clone()).into_iter();
    values.map(|value| value as usize).collect()
}

impl Received {
    /// Runs this rank's experts: inputs, weights and outputs. None if it has none of them.
    fn serve(
        self,
        n_experts: usize,
        hidden: usize,
        device: &Device,
        serve: impl Fn(ServedRows) -> Tensor<2>,
    ) -> Option<[Tensor<2>; 3]> {
        if n_experts == 0 {
            return None;
        }
        let slots = self.experts.len().checked_div(self.rows).unwrap_or(1);
        let shape = [self.rows, slots];
        let leaf = |values: Vec<f32>, shape: [usize; 2]| {
            let tensor = Tensor::<2>::from_data(TensorData::new(values, shape), device);
            match device.is_autodiff() {
                true => tensor.require_grad(),
                false => tensor,
            }
        };
        let x = leaf(self.x, [self.rows, hidden]);
        let weights = leaf(self.weights, shape);
        let ids = Tensor::<2, Int>::from_data(TensorData::new(self.experts, shape), device);
        let routing = Routing {
            part: Some(self.part),
            ..first_experts(ids, weights.clone(), n_experts)
        };
        let y = serve(ServedRows {
            x: x.clone(),
            routing,
            dropout_seed: self.dropout_seed,
        });
        Some([x, weights, y])
    }
}
