//! Stacks of experts of which each rank has a part.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Device, Tensor};
use kernels::device::read;
use model::{Model, StackShard};
use parallel::{Ask, MessageWriter};

use super::{Ranks, tensors, values_of, write};
use crate::{Error, Result};

/// Bits of a question that are the number of an expert; the others are that of a parameter.
const EXPERT_BITS: u32 = 32;

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

/// Values of trained tensors: this rank's, and on demand those of experts that others have. A checkpoint is gathered tensor by
/// tensor instead (`OwnState`).
pub(crate) struct SharedValues<'a> {
    ranks: &'a Ranks,
    own: Vec<(String, Tensor<1>)>,
}

impl<'a> SharedValues<'a> {
    pub(crate) fn new(ranks: &'a Ranks, model: &Model) -> Self {
        let parameters = model.parameters().into_iter();
        let own = parameters.map(|parameter| (parameter.name, parameter.values));
        Self {
            ranks,
            own: own.collect(),
        }
    }

    /// Some of a parameter's values: of an expert, if ranks share it out.
    pub(crate) fn read(
        &self,
        ask: &mut Ask<'_>,
        name: &str,
        range: Range<usize>,
    ) -> std::result::Result<Vec<f32>, checkpoint::Error> {
        let found = self.own.iter().position(|(found, _)| found == name);
        let i = found.expect("the parameters are the model's");
        let Some(stack) = self.ranks.stacks.get(name) else {
            return Ok(read(self.own[i].1.clone().slice([range])));
        };
        let expert = range.start / stack.size.max(1);
        debug_assert_eq!(range, expert * stack.size..(expert + 1) * stack.size);
        if let Some(own) = self.expert(i, expert) {
            return Ok(read(own));
        }
        let failed = |error: Error| checkpoint::Error::Produce {
            tensor: name.to_owned(),
            cause: Box::new(error),
        };
        let question = ((i as u64) << EXPERT_BITS) | expert as u64;
        let answers = ask(question).map_err(|error| failed(error.into()))?;
        values_of(&answers).map_err(failed)
    }

    /// What this rank says to a question of the first one: the values of an expert, if it is of its own.
    pub(crate) fn answer(&self, question: u64) -> Vec<u8> {
        let expert = question & ((1 << EXPERT_BITS) - 1);
        let mut message = MessageWriter::default();
        // Groups have the same; the first one answers.
        if self.ranks.world.rank() < self.ranks.ep()
            && let Some(values) = self.expert((question >> EXPERT_BITS) as usize, expert as usize)
        {
            message.values(&read(values));
        }
        message.finish()
    }

    /// An expert of a stack, if this rank has it.
    fn expert(&self, i: usize, expert: usize) -> Option<Tensor<1>> {
        let (name, values) = self.own.get(i)?;
        let stack = self.ranks.stacks.get(name)?;
        let own = &stack.ranges[self.ranks.place()];
        let place = own.contains(&expert).then(|| expert - own.start)?;
        let range = place * stack.size..(place + 1) * stack.size;
        Some(values.clone().slice(range))
    }
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

    /// A rank's part of a parameter's values, of which there are `len`.
    pub(super) fn part_of(&self, rank: usize, name: &str, len: usize) -> Range<usize> {
        let Some(stack) = self.stacks.get(name) else {
            return 0..len;
        };
        let experts = &stack.ranges[rank % self.ep()];
        experts.start * stack.size..experts.end * stack.size
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
