//! The modules of an adapter, their ranks and their alphas, by the patterns of PEFT's config.

use std::collections::BTreeMap;

use checkpoint::{AdapterConfig, TargetModules};
use regex::Regex;

use crate::Error;
use crate::keys::layer_of;

/// Ranks and alphas of an adapter's modules.
pub(crate) struct PatternedSizes {
    pub(crate) alphas: PeftPatterns<f64>,
    pub(crate) ranks: PeftPatterns<usize>,
    pub(crate) alpha: f64,
    pub(crate) rank: usize,
}

impl PatternedSizes {
    pub(crate) fn alpha_of(&self, module: &str) -> f64 {
        self.alphas.find(module).unwrap_or(self.alpha)
    }

    pub(crate) fn rank_of(&self, module: &str) -> usize {
        self.ranks.find(module).unwrap_or(self.rank)
    }
}

/// PEFT's patterns: regular expressions that match the end of a module's path, from a dot or its start.
pub(crate) struct PeftPatterns<T>(Vec<(Regex, T)>);

impl<T: Copy> PeftPatterns<T> {
    pub(crate) fn new<'a>(patterns: impl Iterator<Item = (&'a str, T)>) -> Result<Self, Error> {
        let compiled = patterns.map(|(pattern, value)| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            regex.map(|regex| (regex, value)).map_err(|error| {
                Error::Unsupported(format!("adapter_config.json: pattern `{pattern}`: {error}"))
            })
        });
        Ok(Self(compiled.collect::<Result<_, _>>()?))
    }

    pub(crate) fn find(&self, module: &str) -> Option<T> {
        self.0
            .iter()
            .find(|(regex, _)| regex.is_match(module))
            .map(|(_, value)| *value)
    }
}

/// The modules that PEFT's config chooses.
pub(crate) struct PeftTargets<'a> {
    config: &'a AdapterConfig,
    modules: Option<ModulePattern<'a>>,
    excluded: Option<ModulePattern<'a>>,
}

/// One of PEFT's two forms of choice.
enum ModulePattern<'a> {
    /// Ends of paths, from a dot on.
    Ends(&'a [String]),
    /// A regular expression on whole paths.
    Whole(Regex),
    /// Every linear layer; or an expression of Python's that is none here. The file itself says what it updates.
    Any,
}

impl<'a> ModulePattern<'a> {
    fn of(targets: &'a TargetModules) -> Self {
        match targets {
            TargetModules::List(ends) => Self::Ends(ends),
            TargetModules::Regex(text) if text == "all-linear" => Self::Any,
            TargetModules::Regex(text) => {
                Regex::new(&format!("^(?:{text})$")).map_or(Self::Any, Self::Whole)
            }
        }
    }

    fn chooses(&self, path: &str) -> bool {
        match self {
            Self::Ends(ends) => ends.iter().any(|end| ends_with_name(path, end)),
            Self::Whole(regex) => regex.is_match(path),
            Self::Any => true,
        }
    }
}

impl<'a> PeftTargets<'a> {
    pub(crate) fn of(config: &'a AdapterConfig) -> Self {
        Self {
            config,
            modules: config.target_modules.as_ref().map(ModulePattern::of),
            excluded: config.exclude_modules.as_ref().map(ModulePattern::of),
        }
    }

    /// Whether PEFT puts an update on a module, or on a stack of experts.
    pub(crate) fn choose(&self, path: &str) -> bool {
        let parameters = self.config.target_parameters.as_deref().unwrap_or_default();
        if parameters.is_empty() && self.modules.is_none() {
            // PEFT has a choice of its own for every family.
            return true;
        }
        let weight = format!("{path}.weight");
        let is_parameter = parameters
            .iter()
            .any(|end| ends_with_name(path, end) || ends_with_name(&weight, end));
        is_parameter || self.chooses_module(path)
    }

    fn chooses_module(&self, path: &str) -> bool {
        // Excluded is what a list or an expression names; `Any` would be everything.
        let is_excluded = match &self.excluded {
            None | Some(ModulePattern::Any) => false,
            Some(pattern) => pattern.chooses(path),
        };
        let layers = self
            .config
            .layers_to_transform
            .as_deref()
            .unwrap_or_default();
        let is_in_layer = || layer_of(path).is_some_and(|layer| layers.contains(&layer));
        match &self.modules {
            _ if is_excluded => false,
            // A whole path stands whatever its layer.
            Some(ModulePattern::Ends(ends)) if ends.iter().any(|end| end == path) => true,
            Some(pattern) => (layers.is_empty() || is_in_layer()) && pattern.chooses(path),
            None => false,
        }
    }
}

/// Whether a path is a name, or ends with it after a dot.
fn ends_with_name(path: &str, name: &str) -> bool {
    let rest = path.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The most frequent value: an adapter's default, from which the rest deviates.
pub(crate) fn most_common<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_insert(0usize) += 1);
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(value, _)| value)
}
