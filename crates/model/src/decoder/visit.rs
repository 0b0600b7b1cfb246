//! The modules of a model that hold weights, by path, and the patterns that choose among them.

use kernels::Matrix;

use crate::modules::attention::Attention;
use crate::decoder::{DecoderLayer, FeedForward, Model};
use crate::modules::linear::Linear;
use crate::modules::mlp::Mlp;
use crate::modules::experts::Experts;

/// A module that holds weights.
#[derive(Debug)]
pub enum Site<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// A layer's routed experts, three projections in one.
    Experts(&'a mut Experts),
}

impl Site<'_> {
    /// Bytes that its weights hold in memory or map.
    pub(crate) fn size_bytes(&self) -> usize {
        match self {
            Self::Linear(linear) => linear.weight.size_bytes(),
            Self::Experts(experts) => experts.size_bytes(),
        }
    }

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

/// The projections of an expert.
pub(crate) const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

impl Model {
    /// Visits all linear layers and experts, in the order of the forward pass, with their checkpoint paths.
    pub fn for_each_site(&mut self, visit: &mut dyn FnMut(&str, Site<'_>)) {
        for (layer_idx, layer) in self.model.layers.iter_mut().enumerate() {
            layer.for_each_site(&format!("model.layers.{layer_idx}"), visit);
        }
        if let Some(head) = &mut self.lm_head {
            visit("lm_head", Site::Linear(head));
        }
    }

    /// The paths of all modules a pattern may choose; a layer's experts appear once per projection.
    pub fn module_paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.clone().for_each_site(&mut |path, site| match site {
            Site::Linear(_) => paths.push(path.into()),
            Site::Experts(_) => paths.extend(
                PROJECTIONS
                    .iter()
                    .map(|projection| format!("{path}.{projection}")),
            ),
        });
        paths
    }

    /// The paths of all projections of single experts, `….experts.7.down_proj`.
    pub fn expert_paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.clone().for_each_site(&mut |path, site| {
            if let Site::Experts(experts) = site {
                let numbers = 0..experts.dims()[0];
                let of = |expert| PROJECTIONS.map(|name| format!("{path}.{expert}.{name}"));
                paths.extend(numbers.flat_map(of));
            }
        });
        paths
    }
}

impl DecoderLayer {
    /// Visits its linear layers and experts; `path` is its own.
    pub(crate) fn for_each_site(&mut self, path: &str, visit: &mut dyn FnMut(&str, Site<'_>)) {
        let at = |name: &str| format!("{path}.{name}");
        match &mut self.self_attn {
            Attention::Mla(mla) => {
                let queries = [
                    ("q_proj", &mut mla.q_proj),
                    ("q_a_proj", &mut mla.q_a_proj),
                    ("q_b_proj", &mut mla.q_b_proj),
                ];
                for (name, linear) in queries {
                    if let Some(linear) = linear {
                        visit(&at(&format!("self_attn.{name}")), Site::Linear(linear));
                    }
                }
                visit(
                    &at("self_attn.kv_a_proj_with_mqa"),
                    Site::Linear(&mut mla.kv_a_proj_with_mqa),
                );
                visit(&at("self_attn.kv_b_proj"), Site::Linear(&mut mla.kv_b_proj));
                visit(&at("self_attn.o_proj"), Site::Linear(&mut mla.o_proj));
            }
            Attention::Gqa(gqa) => {
                visit(&at("self_attn.q_proj"), Site::Linear(&mut gqa.q_proj));
                visit(&at("self_attn.k_proj"), Site::Linear(&mut gqa.k_proj));
                visit(&at("self_attn.v_proj"), Site::Linear(&mut gqa.v_proj));
                visit(&at("self_attn.o_proj"), Site::Linear(&mut gqa.o_proj));
            }
        }
        match &mut self.mlp {
            FeedForward::Dense(mlp) => visit_mlp(&at("mlp"), mlp, visit),
            FeedForward::Moe(moe) => {
                visit(&at("mlp.gate"), Site::Linear(&mut moe.gate));
                visit(&at("mlp.experts"), Site::Experts(&mut moe.experts));
                if let Some(shared) = &mut moe.shared_experts {
                    visit_mlp(&at("mlp.shared_experts"), shared, visit);
                }
            }
        }
    }
}

fn visit_mlp(path: &str, mlp: &mut Mlp, visit: &mut dyn FnMut(&str, Site<'_>)) {
    visit(
        &format!("{path}.gate_proj"),
        Site::Linear(&mut mlp.gate_proj),
    );
    visit(&format!("{path}.up_proj"), Site::Linear(&mut mlp.up_proj));
    visit(
        &format!("{path}.down_proj"),
        Site::Linear(&mut mlp.down_proj),
    );
}

/// Whether a pattern chooses a module.
///
/// A pattern is some consecutive components of the path (`q_a_proj`, `mlp.down_proj`, `experts`, `layers.3`), with `*`
/// for anything within one component. `all-linear` chooses every linear layer and expert but the router and the
/// output head.
pub fn matches(pattern: &str, module: &str) -> bool {
    let parts: Vec<&str> = module.split('.').collect();
    if pattern == "all-linear" {
        return !matches!(parts.last(), Some(&"gate" | &"lm_head"));
    }
    let wanted: Vec<&str> = pattern.split('.').collect();
    parts.windows(wanted.len()).any(|run| {
        run.iter()
            .zip(&wanted)
            .all(|(part, wanted)| matches_part(wanted, part))
    })
}

fn matches_part(pattern: &str, part: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == part,
        Some((head, rest)) => match part.strip_prefix(head) {
            Some(tail) => (0..=tail.len())
                .filter(|at| tail.is_char_boundary(*at))
                .any(|at| matches_part(rest, &tail[at..])),
            None => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_are_runs_of_path_components() {
        let expert = "model.layers.3.mlp.experts.down_proj";
        let shared = "model.layers.3.mlp.shared_experts.down_proj";
        for (pattern, module, expected) in [
            ("down_proj", expert, true),
            ("experts", expert, true),
            ("experts", shared, false),
            ("experts.down_proj", shared, false),
            ("layers.3", expert, true),
            ("layers.*.mlp.shared*", shared, true),
            ("*_proj", shared, true),
            ("down", shared, false),
            ("gate", "model.layers.3.mlp.gate", true),
            ("gate", "model.layers.3.mlp.shared_experts.gate_proj", false),
            ("all-linear", "model.layers.3.mlp.gate", false),
            ("all-linear", "lm_head", false),
            ("all-linear", expert, true),
        ] {
            assert_eq!(matches(pattern, module), expected, "{pattern} on {module}");
        }
    }
}
