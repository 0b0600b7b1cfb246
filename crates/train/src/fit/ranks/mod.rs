//! A run on several ranks, to the bits of one.
//!
//! The micro-batches of a step go to the ranks round by round. Every tensor has an owner, who adds the gradients of a round
//! in the order of the micro-batches, has the moments, and sends the updated values to all that have the tensor. Everything
//! else that is added (losses, rewards, loads, squares) is added by all ranks alike, in the order of micro-batches or of
//! names. So nothing depends on the number of ranks, and all ranks decide alike. Only `exchange=rows`, which adds a rank's
//! experts before they come back, has another order of sums.

mod layout;
mod stacks;

use std::collections::{BTreeMap, BTreeSet};
use std::iter::{repeat, zip};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use checkpoint::TensorSpec;
use kernels::device::read;
use model::{ExpertRanks, Model, Parameter};
use parallel::{MessageReader, MessageWriter, RankError, World};

use super::grad_audit::GradientFacts;
use crate::checkpoint_state::read_optimizer;
use crate::optimizer::Accumulated;
use crate::routing::DriftCounts;
use crate::{Error, Result};

pub(crate) use self::layout::JoinedRanks;
pub use self::layout::RankLayout;
use self::stacks::ShardedStack;
pub(crate) use self::stacks::SharedValues;

/// Sums of squares by name, and by expert for stacks.
pub(crate) type Squares = BTreeMap<(String, usize), f64>;

/// The ranks of a run, and what each owns.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranks {
    pub(crate) world: World,
    pub(crate) layout: RankLayout,
    /// Those that share out experts, if any do.
    experts: Option<Arc<ExpertRanks>>,
    /// The rank of each parameter; of a stack that ranks share out, the group whose ranks own its parts.
    owners: BTreeMap<String, usize>,
    /// Stacks of experts that ranks share out.
    stacks: BTreeMap<String, ShardedStack>,
    /// The parameters in the order of the model, as many as one message has: no rank needs memory for a message of all.
    batches: Vec<Vec<String>>,
    /// Why ranks do not share out the experts that are trained, unless they may.
    pub(crate) why_whole: Option<String>,
}

impl Ranks {
    /// Shares parameters out: the largest first, each to the rank that has least. The parts of a stack that is shared out
    /// belong to the ranks of one group.
    pub(crate) fn new(joined: JoinedRanks, model: &Model) -> Self {
        let JoinedRanks {
            world,
            layout,
            experts,
            why_whole,
        } = joined;
        let stacks: BTreeMap<String, ShardedStack> = (model.stack_shards().into_iter())
            .map(|stack| (stack.name.clone(), ShardedStack::new(&stack)))
            .collect();
        let mut sizes: Vec<(usize, String)> = (model.parameters().into_iter())
            .filter(|parameter| !stacks.contains_key(&parameter.name))
            .map(|parameter| (parameter.values.dims()[0], parameter.name))
            .collect();
        sizes.sort_by(|a, b| (b.0, &a.1).cmp(&(a.0, &b.1)));
        let mut owned = vec![0; world.ranks()];
        let mut owners = BTreeMap::new();
        for (size, name) in sizes {
            let least = (0..owned.len())
                .min_by_key(|rank| owned[*rank])
                .unwrap_or(0);
            owned[least] += size;
            owners.insert(name, least);
        }
        let ep = experts.as_ref().map_or(1, |ranks| ranks.ep());
        let groups = world.ranks() / ep;
        owners.extend((stacks.keys().cloned()).zip((0..groups).cycle()));
        let mut ranks = Self {
            world,
            layout,
            experts,
            owners,
            stacks,
            batches: vec![],
            why_whole,
        };
        ranks.batches = ranks.batches_of(model);
        ranks
    }

    /// The parameters of a model by messages, the same ones on all ranks.
    fn batches_of(&self, model: &Model) -> Vec<Vec<String>> {
        let (mut batches, mut len) = (Vec::<Vec<String>>::new(), 0);
        for parameter in model.parameters() {
            let whole = self.whole_len(&parameter.name, parameter.values.dims()[0]);
            // As much of a stack travels as a rank has, and nothing if no other rank has the same.
            let sent = match (self.stacks.contains_key(&parameter.name), self.ep()) {
                (false, _) => whole,
                (true, ep) if ep == self.world.ranks() => 0,
                (true, ep) => whole.div_ceil(ep),
            };
            match batches.last_mut().filter(|_| len + sent <= BATCH_VALUES) {
                Some(batch) => batch.push(parameter.name),
                None => {
                    len = 0;
                    batches.push(vec![parameter.name]);
                }
            }
            len += sent;
        }
        batches
    }

    /// Whether this rank has the moments of a parameter, or of its own part of it.
    pub(crate) fn owns(&self, name: &str) -> bool {
        self.is_owner(self.world.rank(), name)
    }

    fn is_owner(&self, rank: usize, name: &str) -> bool {
        self.world.is_alone() || self.owner(name, rank) == rank
    }

    /// The rank that has the moments of what a rank has of a parameter.
    fn owner(&self, name: &str, rank: usize) -> usize {
        let owner = self.owners.get(name).copied().unwrap_or(0);
        match self.stacks.contains_key(name) {
            true => owner * self.ep() + rank % self.ep(),
            false => owner,
        }
    }

    /// Whether ranks need each other's experts in a forward pass.
    pub(crate) fn shards_experts(&self) -> bool {
        self.experts.is_some()
    }

    /// Micro-batches of a rank that take turns: two, if rows of one travel while the other is computed.
    pub(crate) fn turns(&self) -> usize {
        match self.shards_experts() && self.layout.overlaps() {
            true => 2,
            false => 1,
        }
    }

    fn ep(&self) -> usize {
        self.experts.as_ref().map_or(1, |ranks| ranks.ep())
    }

    /// This rank's place in the group that shares out experts.
    fn place(&self) -> usize {
        self.experts.as_ref().map_or(0, |ranks| ranks.place())
    }

    /// Those of a step's micro-batches that this rank computes: one of each round.
    pub(crate) fn own<T>(&self, all: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
        all.skip(self.world.rank()).step_by(self.world.ranks())
    }

    /// Counts of all ranks.
    pub(crate) fn counts(&self, own: DriftCounts) -> Result<DriftCounts> {
        let mut message = MessageWriter::default();
        for (layer, [changed, all]) in own {
            message.count(layer as u64).count(changed).count(all);
        }
        let mut sums = DriftCounts::new();
        for message in self.world.all("routing drift", message.finish())? {
            let mut reader = MessageReader::new(&message);
            while !reader.is_empty() {
                let mut next = || reader.count();
                let sum = sums.entry(next()? as usize).or_default();
                for part in sum {
                    *part += next()?;
                }
            }
        }
        Ok(sums)
    }

    /// Adds the gradients of a round's micro-batches: to `sums` come those that this rank owns.
    pub(crate) fn add(
        &self,
        sums: &mut Accumulated,
        gradients: Vec<(String, Tensor<1>)>,
        device: &Device,
    ) -> Result<()> {
        if self.world.is_alone() {
            sums.add(gradients);
            return Ok(());
        }
        // An expert has one for each micro-batch whose rows it served.
        let mut by_name = BTreeMap::<String, Vec<Tensor<1>>>::new();
        for (name, gradient) in gradients {
            by_name.entry(name).or_default().push(gradient);
        }
        for batch in &self.batches {
            let (mut own, mut messages) = (vec![], self.writers());
            let found = batch.iter().filter_map(|name| by_name.remove_entry(name));
            for (name, gradient) in found.flat_map(|(name, all)| zip(repeat(name), all)) {
                match self.owner(&name, self.world.rank()) {
                    owner if owner == self.world.rank() => own.push((name, gradient)),
                    owner => write(&mut messages[owner], &name, gradient),
                }
            }
            for (rank, message) in self.exchange("gradients", messages)?.iter().enumerate() {
                sums.add(match rank == self.world.rank() {
                    true => std::mem::take(&mut own),
                    false => tensors(message, device)?,
                });
            }
        }
        Ok(())
    }

    /// A message to each rank.
    fn writers(&self) -> Vec<MessageWriter> {
        vec![MessageWriter::default(); self.world.ranks()]
    }

    fn exchange(&self, name: &str, messages: Vec<MessageWriter>) -> Result<Vec<Vec<u8>>> {
        let messages = messages.into_iter().map(MessageWriter::finish);
        Ok(self.world.exchange(name, messages.collect())?)
    }

    /// What owners know of the gradients of their tensors, on the first rank; nothing on the others.
    pub(crate) fn gradient_facts(
        &self,
        sums: &Accumulated,
        parameters: &[Parameter],
    ) -> Result<BTreeMap<String, GradientFacts>> {
        let mut message = MessageWriter::default();
        for parameter in parameters.iter().filter(|own| self.owns(&own.name)) {
            message.bytes(parameter.name.as_bytes());
            GradientFacts::of(parameter, sums.get(&parameter.name)).write(&mut message);
        }
        let mut all = BTreeMap::<String, GradientFacts>::new();
        for message in self.world.to_first("first gradients", message.finish())? {
            let mut reader = MessageReader::new(&message);
            while !reader.is_empty() {
                let name = reader.text()?;
                let facts = GradientFacts::read(&mut reader)?;
                match all.get_mut(&name) {
                    Some(found) => found.join(facts),
                    None => _ = all.insert(name, facts),
                }
            }
        }
        Ok(all)
    }

    /// Names that any rank has.
    pub(crate) fn names_of_any(&self, own: BTreeSet<String>) -> Result<BTreeSet<String>> {
        let mut message = MessageWriter::default();
        own.iter()
            .for_each(|name| _ = message.bytes(name.as_bytes()));
        let mut all = BTreeSet::new();
        for message in self.world.all("names", message.finish())? {
            let mut reader = MessageReader::new(&message);
            while !reader.is_empty() {
                all.insert(reader.text()?);
            }
        }
        Ok(all)
    }

    /// The sums of squares of all owners' gradients: of each tensor, of each expert of a stack.
    pub(crate) fn squares(&self, own: Vec<(String, Vec<f32>)>) -> Result<Squares> {
        let mut message = MessageWriter::default();
        for (name, squares) in own {
            let first = self.stacks.get(&name);
            let first = first.map_or(0, |stack| stack.ranges[self.place()].start);
            message
                .bytes(name.as_bytes())
                .count(first as u64)
                .values(&squares);
        }
        let mut all = Squares::new();
        for message in self.world.all("squares", message.finish())? {
            let mut reader = MessageReader::new(&message);
            while !reader.is_empty() {
                let (name, first) = (reader.text()?, reader.count()? as usize);
                let squares = (first..).zip(reader.values()?);
                all.extend(squares.map(|(i, square)| ((name.clone(), i), f64::from(square))));
            }
        }
        Ok(all)
    }

    /// Messages about this rank's batches → about all, in their order.
    pub(crate) fn in_order(&self, own: Vec<Vec<u8>>, n_all: usize) -> Result<Vec<Vec<u8>>> {
        if self.world.is_alone() {
            return Ok(own);
        }
        let mut message = MessageWriter::default();
        own.iter().for_each(|one| _ = message.bytes(one));
        let lists = self.world.all("sums of micro-batches", message.finish())?;
        let mut readers: Vec<_> = lists.iter().map(|list| MessageReader::new(list)).collect();
        let mut all = Vec::new();
        for i in 0..n_all {
            let reader = &mut readers[i % lists.len()];
            all.push(reader.bytes()?.to_vec());
        }
        Ok(all)
    }

    /// Gives all ranks the values of their owners.
    pub(crate) fn share(&self, model: &mut Model, device: &Device) -> Result<()> {
        if self.world.is_alone() {
            return Ok(());
        }
        let own = model.parameters().into_iter();
        let own = own.filter(|parameter| self.owns(&parameter.name));
        let own: BTreeMap<_, _> = own.map(|own| (own.name, own.values)).collect();
        let (mut batches, mut values) = (self.batches.iter().peekable(), BTreeMap::new());
        let mut failed = Ok(());
        model.map_parameters(&mut |name, old| {
            // A batch comes when its first parameter does: no more than one is in memory.
            if let Some(batch) = batches.next_if(|batch| batch[0] == name)
                && failed.is_ok()
            {
                let owned = batch.iter().filter_map(|name| own.get_key_value(name));
                match self.values_of_owners(owned, device) {
                    Ok(found) => values = found,
                    Err(error) => failed = Err(error),
                }
            }
            values.remove(name).unwrap_or(old)
        });
        assert!(
            failed.is_err() || batches.next().is_none(),
            "a model maps its parameters in their order"
        );
        failed
    }

    /// Gives some of this rank's values to those that have the same parameters, and gets theirs.
    fn values_of_owners<'a>(
        &self,
        own: impl Iterator<Item = (&'a String, &'a Tensor<1>)>,
        device: &Device,
    ) -> Result<BTreeMap<String, Tensor<1>>> {
        let mut messages = self.writers();
        for (name, values) in own {
            let mut message = MessageWriter::default();
            write(&mut message, name, values.clone());
            let message = message.finish();
            for rank in self.others_with(name) {
                messages[rank].append(&message);
            }
        }
        let mut values = BTreeMap::new();
        for message in self.exchange("weights", messages)? {
            values.extend(tensors(&message, device)?);
        }
        Ok(values)
    }

    /// The other ranks that have what this one has of a parameter.
    fn others_with(&self, name: &str) -> impl Iterator<Item = usize> + use<> {
        self.others_in_place(match self.stacks.contains_key(name) {
            true => self.ep(),
            false => 1,
        })
    }

    /// The other ranks in this one's place of groups of `size`.
    fn others_in_place(&self, size: usize) -> impl Iterator<Item = usize> + use<> {
        let (rank, first) = (self.world.rank(), self.world.rank() % size);
        (first..self.world.ranks())
            .step_by(size)
            .filter(move |other| *other != rank)
    }

    /// Reads the tensors of a checkpoint on the first rank, and gives each rank what it has of them: of parameters its part, of
    /// moments that of their owner, of anything else all. `place` receives the number of a tensor and its values.
    pub(crate) fn read_tensors(
        &self,
        folder: &Path,
        specs: &[TensorSpec],
        mut place: impl FnMut(usize, Vec<f32>) -> Result<()>,
    ) -> Result<()> {
        let world = &self.world;
        if world.is_alone() {
            return read_optimizer(folder, specs, place);
        }
        let say = |messages| world.exchange("tensor", messages);
        if world.is_first() {
            let mut given = 0;
            let read = read_optimizer(folder, specs, |i, mut values| {
                let part = |rank| &values[self.part_of_tensor(rank, &specs[i].name, values.len())];
                let message = |rank| {
                    let mut message = MessageWriter::default();
                    if rank > 0 {
                        message.values(part(rank));
                    }
                    message.finish()
                };
                given = i + 1;
                say((0..world.ranks()).map(message).collect())?;
                // The first rank's part is the first one.
                values.truncate(self.part_of_tensor(0, &specs[i].name, values.len()).end);
                place(i, values)
            });
            if let Err(error) = &read
                && given < specs.len()
            {
                // The others get the reason in place of values; here it is whole.
                let mut why = MessageWriter::default();
                why.count(NO_VALUES).bytes(error.to_string().as_bytes());
                _ = say(vec![why.finish(); world.ranks()]);
            }
            return read;
        }
        for i in 0..specs.len() {
            let message = say(vec![Vec::new(); world.ranks()])?.swap_remove(0);
            if MessageReader::new(&message).count()? == NO_VALUES {
                let mut reader = MessageReader::new(&message[8..]);
                return Err(RankError::First(reader.text()?).into());
            }
            place(i, MessageReader::new(&message).values()?)?;
        }
        Ok(())
    }

    /// What a rank has of a checkpoint's tensor.
    fn part_of_tensor(&self, rank: usize, tensor: &str, len: usize) -> Range<usize> {
        match tensor.split_once('/') {
            Some(("moment1" | "moment2", name)) if !self.is_owner(rank, name) => 0..0,
            Some((_, name)) => self.part_of(rank, name, len),
            None => 0..len,
        }
    }

    /// What the first rank that has an answer says, to each question.
    pub(crate) fn vote<const N: usize>(&self, own: [Option<u64>; N]) -> Result<[Option<u64>; N]> {
        if self.world.is_alone() {
            return Ok(own);
        }
        let mut message = MessageWriter::default();
        for answer in own {
            message
                .count(u64::from(answer.is_some()))
                .count(answer.unwrap_or(0));
        }
        let mut said = [None; N];
        for message in self.world.all("votes", message.finish())? {
            let mut reader = MessageReader::new(&message);
            for answer in &mut said {
                let is_some = reader.count()? == 1;
                let value = reader.count()?;
                *answer = answer.or(is_some.then_some(value));
            }
        }
        Ok(said)
    }

    /// Refuses ranks that differ in something: what it is, and its value here.
    pub(crate) fn expect_alike(&self, facts: &[(&'static str, &str)]) -> Result<()> {
        let mut message = MessageWriter::default();
        for (_, value) in facts {
            message.bytes(value.as_bytes());
        }
        let said = self.world.all("comparison", message.finish())?;
        for (rank, message) in said.iter().enumerate() {
            let mut reader = MessageReader::new(message);
            for (what, own) in facts {
                if reader.text()? != *own {
                    return Err(Error::OtherRank { rank, what });
                }
            }
        }
        Ok(())
    }
}

/// The most values of a message about several parameters: 64 MB.
const BATCH_VALUES: usize = 1 << 24;

/// The number of values that stands for none.
const NO_VALUES: u64 = u64::MAX;

/// The values of a tensor whose parts ranks have said, in their order.
pub(crate) fn values_of(answers: &[Vec<u8>]) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for answer in answers.iter().filter(|answer| !answer.is_empty()) {
        values.extend(MessageReader::new(answer).values()?);
    }
    Ok(values)
}

fn write(message: &mut MessageWriter, name: &str, values: Tensor<1>) {
    message.bytes(name.as_bytes()).values(&read(values));
}

/// The named tensors of a message.
fn tensors(message: &[u8], device: &Device) -> Result<Vec<(String, Tensor<1>)>> {
    let (mut reader, mut found) = (MessageReader::new(message), Vec::new());
    while !reader.is_empty() {
        let name = reader.text()?;
        let values = reader.values()?;
        found.push((name, Tensor::from_floats(values.as_slice(), device)));
    }
    Ok(found)
}
