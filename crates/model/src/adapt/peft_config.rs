//! The `adapter_config.json` of an adapter: what PEFT has to be told to make the same model of it.
//!
//! On transformers 5, PEFT takes every target `gate_proj`, `up_proj` and `down_proj` of a mixture for the routed experts', which are
//! stacked there: dense layers and shared experts with these names have to be named as parameters. It makes one stacked
//! update of the gate's and the up projection's, with the sum of their ranks, and a scale that is right for plain LoRA of the
//! config's own rank only: any other needs a pattern that says so.
//!
//! Source: huggingface/peft 0.21.2: src/peft/utils/transformers_weight_conversion.py and src/peft/tuners/tuners_utils.py;
//! checked with it, see tests/goldens/peft_reads.py.

use std::collections::{BTreeMap, BTreeSet};

use checkpoint::{AdapterConfig, OrderedMap, TargetModules, TrainableTokens};

use super::lora_config::Scaling;
use super::peft_patterns::most_common;
use super::peft_write::last_name;
use super::weights::{AdapterWeights, WeightUpdate, fused_name};
use crate::keys::{EMBEDDING, PROJECTIONS};

/// What the paths of routed experts contain.
const OF_EXPERT: &str = ".experts.";

impl AdapterWeights {
    /// The adapter's settings.
    pub(super) fn config(&self, base: &str) -> AdapterConfig {
        let named = self.linear.iter().map(|(path, pair)| (path.clone(), pair));
        let fused = self
            .fused
            .iter()
            .map(|((owner, fused), pairs)| (fused_name(owner, *fused), &pairs[0]));
        let all: Vec<(String, &WeightUpdate)> = named.chain(fused).collect();
        let rank = most_common(all.iter().map(|(_, pair)| pair.rank)).unwrap_or(1);
        let alpha = most_common(all.iter().map(|(_, pair)| pair.alpha.to_bits()))
            .map_or(1.0, f64::from_bits);
        let mut config = AdapterConfig::new(rank, alpha);
        config.base_model_name_or_path = Some(base.into());
        config.lora_dropout = f64::from(self.dropout);
        config.use_rslora = self.scaling == Scaling::RsLora;
        config.use_dora = all.iter().any(|(_, pair)| pair.magnitude.is_some());
        let other_ranks = all.iter().filter(|(_, pair)| pair.rank != rank);
        config.rank_pattern = other_ranks
            .flat_map(|(name, pair)| self.patterns(name, pair.rank))
            .collect();
        let other_alphas = all.iter().filter(|(_, pair)| pair.alpha != alpha);
        config.alpha_pattern = other_alphas
            .flat_map(|(name, pair)| self.patterns(name, pair.alpha))
            .collect();
        for (owner, experts) in self.stacked_experts() {
            experts.add_patterns(&owner, &mut config);
        }
        config.target_modules = Some(TargetModules::List(self.target_modules()));
        let parameters = self.target_parameters();
        if !parameters.is_empty() && !config.use_dora {
            // PEFT has no dropout on parameters, and refuses any number but 0.
            config.lora_dropout = 0.0;
        }
        config.target_parameters = (!parameters.is_empty()).then_some(parameters);
        let replaced = self
            .replaced
            .keys()
            .filter_map(|key| key.strip_suffix(".weight"));
        let saved: Vec<String> = replaced
            .filter(|path| !self.linear.contains_key(*path))
            .map(str::to_owned)
            .collect();
        config.modules_to_save = (!saved.is_empty()).then_some(saved);
        config.trainable_token_indices = self.tokens.as_ref().map(|rows| {
            let module = last_name(EMBEDDING).to_owned();
            TrainableTokens::ByModule(OrderedMap(vec![(module, rows.ids.clone())]))
        });
        config
    }

    /// The patterns that give a value to one module: a second one if PEFT knows it as a parameter.
    fn patterns<T: Copy>(&self, name: &str, value: T) -> Vec<(String, T)> {
        let mut patterns = vec![(regex::escape(name), value)];
        if self.is_parameter(name) {
            patterns.push((regex::escape(&format!("{name}.weight")), value));
        }
        patterns
    }

    /// Whether PEFT has to be told of a module as a parameter: it would take its name for the experts'.
    fn is_parameter(&self, path: &str) -> bool {
        let is_named_alike = PROJECTIONS.contains(&last_name(path)) && !path.contains(OF_EXPERT);
        self.has_experts && is_named_alike && self.linear.contains_key(path)
    }

    /// The modules, by their last names if those choose no other.
    fn target_modules(&self) -> Vec<String> {
        let paths = self.linear.keys();
        if !self.others.is_empty() {
            return paths
                .filter(|path| !self.is_parameter(path))
                .cloned()
                .collect();
        }
        let names = paths.filter(|path| !self.is_parameter(path));
        let names: BTreeSet<String> = names.map(|path| last_name(path).into()).collect();
        names.into_iter().collect()
    }

    /// The parameters: stacked experts, and what PEFT would take for experts otherwise.
    fn target_parameters(&self) -> Vec<String> {
        let fused = self.fused.keys().map(|(_, fused)| fused.parameter().into());
        let alike = self.linear.keys().filter(|path| self.is_parameter(path));
        let alike = alike.map(|path| match self.others.is_empty() {
            // The end of the path after the layer's number: `mlp.shared_experts.up_proj`.
            true => {
                let mut parts = path.splitn(4, '.');
                format!("{}.weight", parts.nth(3).unwrap_or(path))
            }
            false => format!("{path}.weight"),
        });
        let all: BTreeSet<String> = fused.chain(alike).collect();
        all.into_iter().collect()
    }

    /// The updates of the experts of each layer that has any in the classic dialect, as PEFT stacks them.
    fn stacked_experts(&self) -> BTreeMap<String, StackedExperts<'_>> {
        let mut stacks: BTreeMap<String, StackedExperts<'_>> = BTreeMap::new();
        for (path, update) in &self.linear {
            let Some((layer, rest)) = path.split_once(OF_EXPERT) else {
                continue;
            };
            let stack = stacks.entry(format!("{layer}.experts")).or_default();
            let place = PROJECTIONS.iter().position(|name| *name == last_name(rest));
            if let Some(place) = place {
                stack.updates[place] = Some(update);
            }
        }
        stacks
    }

    /// What PEFT does not read of the adapter, and why; none if it reads all of it rightly.
    pub fn unread_by_peft(&self) -> Option<String> {
        if !self.has_experts {
            return None;
        }
        let with_dora = |(path, update): &(&String, &WeightUpdate)| {
            self.is_parameter(path) && update.magnitude.is_some()
        };
        if let Some((path, _)) = self.linear.iter().find(with_dora) {
            return Some(format!(
                "PEFT 0.21 on transformers 5 cannot load DoRA on `{path}` and its like: it takes their names for the \
                 routed experts', which have no DoRA"
            ));
        }
        let stacks = self.stacked_experts();
        let single = |owner: &&String| {
            let start = format!("{owner}.");
            self.others
                .iter()
                .any(|other| other.starts_with(&start) && is_of_expert(other, &start))
        };
        if let Some(owner) = stacks.keys().find(single) {
            return Some(format!(
                "PEFT 0.21 on transformers 5 cannot load updates of single experts (`{owner}`): it stacks the experts of \
                 a layer, and needs all of them"
            ));
        }
        let (owner, problem) = stacks
            .iter()
            .find_map(|(owner, stack)| Some((owner, stack.problem()?)))?;
        Some(format!(
            "PEFT 0.21 on transformers 5 cannot load the updates of `{owner}`: {problem}"
        ))
    }
}

/// Whether a path after an experts' is one of a single expert.
fn is_of_expert(path: &str, owner: &str) -> bool {
    let number = path[owner.len()..].split('.').next();
    number.is_some_and(|number| number.parse::<usize>().is_ok())
}

/// The updates of one expert, for all of its layer: gate, up and down.
#[derive(Default)]
struct StackedExperts<'a> {
    updates: [Option<&'a WeightUpdate>; 3],
}

impl StackedExperts<'_> {
    /// Why PEFT cannot stack them.
    fn problem(&self) -> Option<&'static str> {
        match self.updates {
            [Some(gate), Some(up), _] if gate.scale != up.scale => {
                Some("gate and up have other scales, and become one update")
            }
            [Some(_), None, _] | [None, Some(_), _] => {
                Some("gate and up become one update, and one of them has none")
            }
            _ => None,
        }
    }

    /// Says to PEFT which rank and alpha its stacked updates have, where it would take others.
    fn add_patterns(&self, owner: &str, config: &mut AdapterConfig) {
        let (rank, alpha) = (config.r, config.lora_alpha);
        let [gate, up, down] = self.updates;
        let both = gate.zip(up).map(|(gate, up)| {
            let sum = gate.rank + up.rank;
            let scaling = if config.use_rslora {
                Scaling::RsLora
            } else {
                Scaling::Plain
            };
            (sum, scaling.alpha(gate.alpha, [gate.rank, sum]))
        });
        let down = down.map(|down| (down.rank, down.alpha));
        for (parameter, found, default) in [
            ("gate_up_proj", both, (2 * rank, 2.0 * alpha)),
            ("down_proj", down, (rank, alpha)),
        ] {
            let name = regex::escape(&format!("{owner}.{parameter}"));
            let Some(found) = found.filter(|found| *found != default) else {
                continue;
            };
            // Both, for PEFT's own pattern would stand for the one that is not said.
            config.rank_pattern.0.push((name.clone(), found.0));
            config.alpha_pattern.0.push((name, found.1));
        }
    }
}
