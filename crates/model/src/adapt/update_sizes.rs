//! The sizes of an adapter's updates.

use super::weights::AdapterWeights;

/// The size of a linear layer's update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct UpdateSize {
    pub(crate) rank: usize,
    pub(crate) has_dora: bool,
    pub(crate) drops: bool,
}

impl AdapterWeights {
    /// The size of the update of a linear layer, by its path; none if it has none.
    pub(crate) fn size_of(&self, module: &str) -> Option<UpdateSize> {
        let update = self.linear.get(module)?;
        Some(UpdateSize {
            rank: update.rank,
            has_dora: update.magnitude.is_some(),
            drops: self.dropout > 0.0,
        })
    }

    /// Parameters of the updates of a layer's experts, by their path.
    pub(crate) fn size_of_experts(&self, path: &str) -> usize {
        let fused = self.fused.iter().filter(|((owner, _), _)| owner == path);
        let fused = fused.flat_map(|(_, pairs)| pairs);
        let prefix = format!("{path}.");
        let apart = self.linear.range(prefix.clone()..);
        let apart = apart.take_while(|(module, _)| module.starts_with(&prefix));
        let updates = fused.chain(apart.map(|(_, update)| update));
        updates.map(|update| update.a.len() + update.b.len()).sum()
    }
}
