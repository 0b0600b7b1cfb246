//! The sizes of an adapter's updates.

use std::collections::BTreeSet;

use super::weights::AdapterWeights;
use crate::keys::PROJECTIONS;

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

    /// Parameters of the updates of a layer's experts, by their path, and how many experts have one.
    pub(crate) fn size_of_experts(&self, path: &str) -> (usize, usize) {
        let fused = self.fused.iter().filter(|((owner, _), _)| owner == path);
        let fused: Vec<_> = fused.map(|(_, pairs)| pairs).collect();
        let prefix = format!("{path}.");
        let apart = self.linear.range(prefix.clone()..);
        let apart = apart.take_while(|(module, _)| module.starts_with(&prefix));
        let (mut parameters, mut updated) = (0, BTreeSet::new());
        for (module, update) in apart {
            let expert = module[prefix.len()..].split_once('.');
            if let Some((expert, _)) = expert.filter(|(_, name)| PROJECTIONS.contains(name)) {
                parameters += update.a.len() + update.b.len();
                updated.insert(expert);
            }
        }
        let of_fused = fused.iter().copied().flatten();
        parameters += of_fused
            .map(|pair| pair.a.len() + pair.b.len())
            .sum::<usize>();
        let n_fused = fused.iter().map(|pairs| pairs.len()).max();
        (parameters, n_fused.unwrap_or(0).max(updated.len()))
    }
}
