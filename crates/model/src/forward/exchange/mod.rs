//! Experts on several ranks: rows go to the ranks that hold their experts, and what the experts make of them comes back.
//!
//! Ranks stand in groups of `ep`, and each group holds all experts: a rank a contiguous range of every layer's. Each rank
//! of a group computes a micro-batch of its own, and at a mixture layer serves the others'. A rank runs its experts once for
//! each micro-batch, so that sums, gradients and random values are those of a rank that has all experts: with a row for each
//! slot there and back, every bit is. No exchange runs inside autodiff: the graph ends at the rows, on both sides, and
//! [`ExchangedExperts::backward`] carries gradients across.

mod rows;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use kernels::device::{read, read_ints};
use kernels::{Routing, SuppliedGradients};
use parallel::{MessageReader, MessageWriter, World};

use self::rows::{Received, Sent, SentPlan, add_rows, second_values};
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

impl fmt::Display for ExchangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slots => "slots",
            Self::Rows => "rows",
        })
    }
}

impl FromStr for ExchangeKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "slots" => Ok(Self::Slots),
            "rows" => Ok(Self::Rows),
            _ => Err("expected slots or rows".into()),
        }
    }
}

/// The ranks that share out the experts of every layer.
#[derive(Clone, Debug)]
pub struct ExpertRanks {
    world: World,
    ep: usize,
    kind: ExchangeKind,
}

impl ExpertRanks {
    /// Groups of `ep` ranks.
    ///
    /// # Panics
    /// If `ep` does not divide the ranks.
    pub fn new(world: World, ep: usize, kind: ExchangeKind) -> Self {
        assert!(
            ep > 0 && world.ranks().is_multiple_of(ep),
            "ep = {ep} of {} ranks",
            world.ranks()
        );
        Self { world, ep, kind }
    }

    /// Number of ranks in a group.
    pub fn ep(&self) -> usize {
        self.ep
    }

    /// This rank's place in its group.
    pub fn place(&self) -> usize {
        self.world.rank() % self.ep
    }

    /// The experts of each rank of a group.
    pub(crate) fn ranges(&self, experts: usize) -> Vec<Range<usize>> {
        let first = |place: usize| place * experts / self.ep;
        (0..self.ep)
            .map(|place| first(place)..first(place + 1))
            .collect()
    }

    /// A message for each rank of this one's group, and from each.
    ///
    /// # Panics
    /// If ranks lose each other: an engine that knows how to leave the process has left it before.
    fn exchange(&self, name: &str, messages: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let group = self.group();
        let mut all = vec![Vec::new(); self.world.ranks()];
        all.splice(group.clone(), messages);
        let all = self.world.exchange(name, all);
        let mut all = all.unwrap_or_else(|lost| panic!("{lost}"));
        all.drain(group).collect()
    }

    /// The ranks of this one's group.
    fn group(&self) -> Range<usize> {
        let first = self.world.rank() - self.place();
        first..first + self.ep
    }
}

/// The experts of one micro-batch as they run on a rank of its group: in which way, and for what.
pub(crate) struct ServedRows {
    /// `[rows, hidden_size]`.
    pub(crate) x: Tensor<2>,
    pub(crate) routing: Routing,
    /// Of the micro-batch.
    pub(crate) dropout_seed: Option<u64>,
}

/// Some of a layer's experts, which one kernel serves, and where each rank of a group has its own of them.
pub(crate) struct SharedOut<'a> {
    pub(crate) ranks: &'a ExpertRanks,
    /// Which of them each rank holds.
    pub(crate) ranges: &'a [Range<usize>],
    /// Layer and part, for messages.
    pub(crate) name: String,
}

/// A micro-batch's experts in a forward pass that is differentiated.
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
}

/// The weighted sum of experts that ranks share out, of a micro-batch; and what its backward pass needs, if there is one.
///
/// # Shapes
/// - `x`: `[tokens, hidden_size]`
/// - returns: `[tokens, hidden_size]`
///
/// # Panics
/// If ranks lose each other.
pub(crate) fn forward(
    of: &SharedOut<'_>,
    (x, routed): (Tensor<2>, &Routed),
    routing: &Routing,
    dropout_seed: Option<u64>,
    serve: impl Fn(ServedRows) -> Tensor<2>,
) -> (Tensor<2>, Option<ExchangedExperts>) {
    let (device, [tokens, hidden]) = (x.device(), x.dims());
    let top_k = routed.weights.dims()[1];
    let plan = SentPlan {
        top_k,
        tokens,
        order: ints(&routing.order),
        offsets: ints(&routing.offsets),
    };
    let sent: Vec<Sent> = (of.ranges.iter())
        .map(|range| plan.rows(range.clone(), of.ranks.kind))
        .collect();
    let (rows, weights) = (read(x.clone()), read(routed.weights.clone()));
    let messages = (sent.iter()).map(|sent| sent.message(&rows, &weights, dropout_seed));
    let messages = (of.ranks).exchange(&format!("rows of {}", of.name), messages.collect());

    let n_own = of.ranges[of.ranks.place()].len();
    let run = |message: Vec<u8>| {
        let received = Received::read(&message).expect("the ranks run one program");
        received.serve(n_own, hidden, &device, &serve)
    };
    let served: Vec<Option<[Tensor<2>; 3]>> = messages.into_iter().map(run).collect();
    let replies = (served.iter()).map(|served| values_message(served.iter().map(|[.., y]| y)));
    let replies = (of.ranks).exchange(&format!("sums of {}", of.name), replies.collect());

    let sum = add_rows(&sent, &replies, tokens * hidden);
    let y = Tensor::from_data(TensorData::new(sum, [tokens, hidden]), &device);
    if !device.is_autodiff() {
        return (y, None);
    }
    let gradients = SuppliedGradients::default();
    let y = kernels::computed_elsewhere(x, routed.weights.clone(), y, gradients.clone());
    let exchanged = ExchangedExperts {
        ranks: of.ranks.clone(),
        name: of.name.clone(),
        shape: [tokens, hidden, top_k],
        sent,
        served,
        gradients,
    };
    (y, Some(exchanged))
}

impl ExchangedExperts {
    /// Carries the gradient of the sum, `[tokens, hidden_size]` and without autodiff, to the experts, and theirs of rows and
    /// weights back to where the layer's graph takes them. `take` takes the gradients of this rank's experts, of one
    /// micro-batch after another.
    ///
    /// # Panics
    /// If ranks lose each other.
    pub(crate) fn backward(self, dy: &Tensor<2>, mut take: impl FnMut(&mut Gradients)) {
        let Self {
            ranks,
            name,
            shape: [tokens, hidden, top_k],
            sent,
            served,
            gradients,
        } = self;
        let dy_values = read(dy.clone());
        let messages = sent.iter().map(|sent| {
            let mut message = MessageWriter::default();
            message.values(&sent.gather(&dy_values, tokens));
            message.finish()
        });
        let messages = ranks.exchange(&format!("gradients of {name}"), messages.collect());
        let replies = messages.into_iter().zip(served).map(|(message, run)| {
            let Some([x, weights, y]) = run else {
                return MessageWriter::default().finish();
            };
            let values = MessageReader::new(&message).values();
            let values = values.expect("the ranks run one program");
            let dy = Tensor::from_data(TensorData::new(values, y.dims()), &y.device());
            // The gradient of this sum by y is exactly dy.
            let mut found = (y * dy).sum().backward();
            let [dx, dweights] = [x, weights].map(|of| {
                let gradient = of.grad(&found);
                gradient.unwrap_or_else(|| of.inner().zeros_like())
            });
            take(&mut found);
            values_message([&dx, &dweights].into_iter())
        });
        let replies: Vec<Vec<u8>> = replies.collect();
        let replies = ranks.exchange(&format!("gradients of rows of {name}"), replies);
        let dx = add_rows(&sent, &replies, tokens * hidden);
        let mut dweights = vec![0.0; tokens * top_k];
        for (sent, reply) in sent.iter().zip(&replies) {
            let values = second_values(reply).expect("the ranks run one program");
            for (slot, value) in sent.slots.iter().zip(values) {
                if let Some(slot) = slot {
                    dweights[*slot] = value;
                }
            }
        }
        gradients.supply(
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

fn values_message<'a>(tensors: impl Iterator<Item = &'a Tensor<2>>) -> Vec<u8> {
    let mut message = MessageWriter::default();
    tensors.for_each(|tensor| _ = message.values(&read(tensor.clone())));
    message.finish()
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
