//! The modules of a model that hold large weights, by their paths: to be read, and to be changed.

use std::sync::Arc;

use kernels::{ExpertCache, ExpertTraffic, Matrix};

use super::{DecoderLayer, FeedForward, Model};
use crate::keys::{EMBEDDING, HEAD, Module, PROJECTIONS, ParamKey};
use crate::modules::attention::Attention;
use crate::modules::experts::Experts;
use crate::modules::linear::Linear;
use crate::modules::norm::Norm;

/// A module that holds weights, to read it.
#[derive(Clone, Copy, Debug)]
pub enum ModuleRef<'a> {
    /// A linear layer.
    Linear(&'a Linear),
    /// A layer's routed experts, three projections in one.
    Experts(&'a Experts),
}

/// A module that holds weights, to change it.
#[derive(Debug)]
pub enum ModuleMut<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// A layer's routed experts, three projections in one.
    Experts(&'a mut Experts),
}

impl ModuleRef<'_> {
    /// Bytes that its weights hold in memory or map.
    pub(crate) fn size_bytes(self) -> usize {
        match self {
            Self::Linear(linear) => linear.weight.size_bytes(),
            Self::Experts(experts) => experts.size_bytes(),
        }
    }
}

impl ModuleMut<'_> {
    /// Visits frozen matrices that are multiplied as they are.
    pub(crate) fn for_each_frozen(self, visit: &mut dyn FnMut(&mut Matrix)) {
        match self {
            Self::Linear(linear) if linear.quantizer.is_some() => {}
            Self::Linear(linear) => linear.weight.for_each_frozen(visit),
            Self::Experts(experts) if experts.quantizer.is_some() => {}
            Self::Experts(experts) => experts.for_each_frozen(visit),
        }
    }
}

impl Model {
    /// All linear layers and experts with their checkpoint paths, in the order of the forward pass.
    pub fn modules(&self) -> Vec<(String, ModuleRef<'_>)> {
        let mut modules = Vec::new();
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            let of_layer = layer.modules().into_iter();
            modules.extend(of_layer.map(|(name, module)| (name.path(Some(layer_idx)), module)));
        }
        let head = self.lm_head.as_ref();
        modules.extend(head.map(|head| (Module::Head.path(None), ModuleRef::Linear(head))));
        modules
    }

    /// [`Self::modules`], to change them.
    pub fn modules_mut(&mut self) -> Vec<(String, ModuleMut<'_>)> {
        let mut modules = Vec::new();
        for (layer_idx, layer) in self.model.layers.iter_mut().enumerate() {
            let of_layer = layer.modules_mut().into_iter();
            modules.extend(of_layer.map(|(name, module)| (name.path(Some(layer_idx)), module)));
        }
        let head = self.lm_head.as_mut();
        modules.extend(head.map(|head| (Module::Head.path(None), ModuleMut::Linear(head))));
        modules
    }

    /// The paths of all modules that a pattern may choose; a layer's experts appear once per projection.
    pub fn module_paths(&self) -> Vec<String> {
        let paths = |(path, module): (String, ModuleRef<'_>)| match module {
            ModuleRef::Linear(_) => vec![path],
            ModuleRef::Experts(_) => PROJECTIONS.map(|name| format!("{path}.{name}")).to_vec(),
        };
        let mut all: Vec<String> = self.modules().into_iter().flat_map(paths).collect();
        // A head that is tied to the embedding may have an update of its own, too.
        all.extend(self.lm_head.is_none().then(|| HEAD.into()));
        all.push(EMBEDDING.into());
        all
    }

    /// All norms with the keys of their weights, to change them.
    pub(crate) fn norms_mut(&mut self) -> Vec<(String, &mut Norm)> {
        let key = |layer: Option<usize>, module| ParamKey::weight(layer, module).to_string();
        let mut norms = vec![(key(None, Module::FinalNorm), &mut self.model.norm)];
        for (layer_idx, layer) in self.model.layers.iter_mut().enumerate() {
            let mut of_layer = vec![
                (Module::InputNorm, &mut layer.input_layernorm),
                (
                    Module::PostAttentionNorm,
                    &mut layer.post_attention_layernorm,
                ),
            ];
            if let Attention::Mla(mla) = &mut layer.self_attn {
                of_layer.extend(
                    mla.q_a_layernorm
                        .as_mut()
                        .map(|norm| (Module::QANorm, norm)),
                );
                of_layer.push((Module::KvANorm, &mut mla.kv_a_layernorm));
            }
            for (module, norm) in of_layer {
                norms.push((key(Some(layer_idx), module), norm));
            }
        }
        norms
    }

    /// The paths of all projections of single experts, `….experts.7.down_proj`.
    pub fn expert_paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        for (path, module) in self.modules() {
            if let ModuleRef::Experts(experts) = module {
                let names = |expert| PROJECTIONS.map(|name| format!("{path}.{expert}.{name}"));
                paths.extend((0..experts.dims()[0]).flat_map(names));
            }
        }
        paths
    }

    /// Bytes that the weights of its linear layers and experts hold in memory or map.
    pub fn size_bytes(&self) -> usize {
        let modules = self.modules().into_iter();
        modules.map(|(_, module)| module.size_bytes()).sum()
    }

    /// Bytes that the weights of its routed experts hold in memory or map.
    pub fn expert_bytes(&self) -> usize {
        let modules = self.modules().into_iter();
        let experts = modules.filter(|(_, module)| matches!(module, ModuleRef::Experts(_)));
        experts.map(|(_, module)| module.size_bytes()).sum()
    }

    /// Bytes of frozen weights that every token needs.
    pub fn common_bytes(&self) -> usize {
        let linear = |(_, module)| match module {
            ModuleRef::Linear(linear) if linear.quantizer.is_none() => Some(&linear.weight),
            ModuleRef::Linear(_) | ModuleRef::Experts(_) => None,
        };
        let head = self.lm_head.is_none();
        let head = head.then_some(&self.model.embed_tokens.weight);
        let weights = self.modules().into_iter().filter_map(linear).chain(head);
        let frozen = weights.filter_map(|weight| weight.frozen());
        frozen.map(|matrix| matrix.size_bytes()).sum()
    }

    /// Visits frozen matrices that are multiplied as they are, except for experts, in the order of the forward pass.
    pub fn for_each_common(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        for (_, module) in self.modules_mut() {
            if let ModuleMut::Linear(_) = module {
                module.for_each_frozen(visit);
            }
        }
        if self.lm_head.is_none() {
            self.model.embed_tokens.weight.for_each_frozen(visit);
        }
    }

    /// Visits the frozen matrices of experts.
    pub fn for_each_expert(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        for (_, module) in self.modules_mut() {
            if let ModuleMut::Experts(_) = module {
                module.for_each_frozen(visit);
            }
        }
    }

    /// Keeps frozen experts on disk, caching the most recently used. Before a layer chooses its experts, it prefetches
    /// `n_prefetch` of those that a token will probably choose; half of top-k if that is none.
    pub fn cache_experts(&mut self, cache: &Arc<ExpertCache>, n_prefetch: Option<usize>) {
        let top_k = self.config.moe.as_ref().map_or(0, |moe| moe.choice.top_k);
        let n_prefetch = n_prefetch.unwrap_or(top_k.div_ceil(2)).min(top_k);
        let mut layers = 0..;
        for (_, module) in self.modules_mut() {
            if let ModuleMut::Experts(experts) = module {
                experts.cache(cache, &mut layers, n_prefetch);
            }
        }
    }

    /// How often experts were in memory, if they have a cache.
    pub fn expert_traffic(&self) -> Option<ExpertTraffic> {
        self.model.layers.iter().find_map(|layer| match &layer.mlp {
            FeedForward::Moe(moe) => moe.experts.traffic(),
            FeedForward::Dense(_) => None,
        })
    }
}

impl DecoderLayer {
    /// Its linear layers and experts, in the order of the forward pass.
    pub(crate) fn modules(&self) -> Vec<(Module, ModuleRef<'_>)> {
        let mut linears = match &self.self_attn {
            Attention::Mla(mla) => mla.linears(),
            Attention::Gqa(gqa) => gqa.linears().to_vec(),
        };
        let (mut experts, mut shared) = (None, None);
        match &self.mlp {
            FeedForward::Dense(mlp) => linears.extend(mlp.linears(Module::Mlp)),
            FeedForward::Moe(moe) => {
                linears.push((Module::Router, &moe.gate));
                experts = Some((Module::Experts, ModuleRef::Experts(&moe.experts)));
                shared = moe.shared_experts.as_ref();
            }
        }
        let shared = shared.map(|mlp| mlp.linears(Module::SharedExperts));
        let linear = |(name, linear)| (name, ModuleRef::Linear(linear));
        let mut modules: Vec<_> = linears.into_iter().map(linear).collect();
        modules.extend(experts);
        modules.extend(shared.into_iter().flatten().map(linear));
        modules
    }

    /// [`Self::modules`], to change them.
    pub(crate) fn modules_mut(&mut self) -> Vec<(Module, ModuleMut<'_>)> {
        let mut linears = match &mut self.self_attn {
            Attention::Mla(mla) => mla.linears_mut(),
            Attention::Gqa(gqa) => gqa.linears_mut().into_iter().collect(),
        };
        let (mut experts, mut shared) = (None, None);
        match &mut self.mlp {
            FeedForward::Dense(mlp) => linears.extend(mlp.linears_mut(Module::Mlp)),
            FeedForward::Moe(moe) => {
                linears.push((Module::Router, &mut moe.gate));
                experts = Some((Module::Experts, ModuleMut::Experts(&mut moe.experts)));
                shared = moe.shared_experts.as_mut();
            }
        }
        let shared = shared.map(|mlp| mlp.linears_mut(Module::SharedExperts));
        let linear = |(name, linear)| (name, ModuleMut::Linear(linear));
        let mut modules: Vec<_> = linears.into_iter().map(linear).collect();
        modules.extend(experts);
        modules.extend(shared.into_iter().flatten().map(linear));
        modules
    }
}
