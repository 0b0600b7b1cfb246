//! Stacks of experts of which each rank has a part.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Device, Tensor};
use kernels::device::read;
use model::{Model, StackShard};
use parallel::MessageWriter;

use super::{Ranks, tensors, write};
use crate::{Error, Result};

/// A stack that the ranks of a group share out.
#[derive(Clone, Debug)]
pub(super) struct ShardedStack {
    /// The experts of each rank of a group.
    pub(super) ranges: Vec<Range<usize>>,
    /// Values of one expert.
    size: usize,
}

impl ShardedStack {
    pub(super) fn new(stack: &StackShard) -> Self {
        let [_, rows, cols] = stack.values.dims();
        Self {
            ranges: stack.ranges.clone(),
            size: rows * cols,
        }
    }
}

/// The parts of tensors by name, in the order of ranks.
pub(super) type StackParts = BTreeMap<String, Vec<Tensor<1>>>;

/// Puts parts together.
pub(super) fn whole(parts: StackParts) -> BTreeMap<String, Tensor<1>> {
    let join = |mut parts: Vec<Tensor<1>>| match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, 0),
    };
    (parts.into_iter())
        .map(|(name, parts)| (name, join(parts)))
        .collect()
}

impl Ranks {
    /// Number of values of a whole parameter, of which this rank has some.
    pub(crate) fn whole_len(&self, name: &str, own: usize) -> usize {
        let Some(stack) = self.stacks.get(name) else {
            return own;
        };
        stack.ranges.last().map_or(0, |last| last.end) * stack.size
    }

    /// The number of the first value of this rank's part of a parameter.
    pub(crate) fn first_element(&self, name: &str) -> usize {
        let stack = self.stacks.get(name);
        stack.map_or(0, |stack| stack.ranges[self.place()].start * stack.size)
    }

    /// This rank's part of a parameter's values.
    pub(crate) fn part_of(&self, name: &str, values: Tensor<1>) -> Tensor<1> {
        let Some(stack) = self.stacks.get(name) else {
            return values;
        };
        let experts = &stack.ranges[self.place()];
        values.slice(experts.start * stack.size..experts.end * stack.size)
    }

    /// The model with all experts, on the first rank; this rank's on the others.
    pub(crate) fn whole_model(&self, model: &Model, device: &Device) -> Result<Model> {
        if self.stacks.is_empty() {
            return Ok(model.clone());
        }
        let mut message = MessageWriter::default();
        // Groups have the same; the first one's is enough.
        if self.world.rank() < self.ep() {
            for stack in model.stack_shards() {
                let len = stack.values.shape().num_elements();
                write(&mut message, &stack.name, stack.values.reshape([len]));
            }
        }
        let mut parts = StackParts::default();
        for message in self.world.to_first("stacks of experts", message.finish())? {
            for (name, part) in tensors(&message, device)? {
                parts.entry(name).or_default().push(part);
            }
        }
        let (mut whole, mut model) = (whole(parts), model.clone());
        if self.world.is_first() {
            model.unshard_experts(&mut |name| whole.remove(name));
        }
        Ok(model)
    }

    /// Refuses ranks whose weights have come apart, as by a processor that rounds otherwise: those that all have, and those
    /// that each group has.
    pub(crate) fn expect_replicas(&self, model: &Model) -> Result<()> {
        if self.world.is_alone() {
            return Ok(());
        }
        let mut hashes = [0; 2];
        for parameter in model.parameters() {
            let hash = &mut hashes[usize::from(self.stacks.contains_key(&parameter.name))];
            let values = read(parameter.values).into_iter();
            *hash = checkpoint::fnv1a(*hash, values.flat_map(f32::to_le_bytes));
        }
        self.expect_alike(&[("weights", &hashes[0].to_string())])?;
        let said = self
            .world
            .all("hash of experts", hashes[1].to_le_bytes().to_vec())?;
        let mut others = self.others_in_place(self.ep());
        match others.find(|rank| said[*rank] != hashes[1].to_le_bytes()) {
            Some(rank) => Err(Error::OtherRank {
                rank,
                what: "experts",
            }),
            None => Ok(()),
        }
    }
}
