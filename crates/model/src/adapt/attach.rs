//! Puts low-rank updates on a model: fresh ones, or those of an adapter.

use burn::tensor::Device;

use super::lora_config::LoraConfig;
use super::update::{AdaptedModule, ExpertUpdates, UpdateSite};
use super::weights::AdapterWeights;
use crate::Error;
use crate::decoder::Model;
use crate::decoder::visit::ModuleMut;
use crate::keys::{EMBEDDING, HEAD};
use crate::modules::experts::Experts;
use crate::modules::linear::{Linear, Weight};
use crate::modules::lora::Lora;
use crate::patterns::matches;

/// Puts fresh updates on the modules that a config chooses; their effect is zero until they are trained.
///
/// # Errors
/// [`Error::NoMatch`] for a pattern (of `target`, `exclude`, `rank_pattern` or `alpha_pattern`) that matches nothing;
/// [`Error::Unsupported`] for experts that are not the same ones in all projections, and for modules that have no DoRA.
pub fn attach(
    model: &mut Model,
    config: &LoraConfig,
    device: &Device,
) -> Result<Vec<AdaptedModule>, Error> {
    check_patterns(model, config)?;
    let adapted = attach_all(model, UpdateSource::Fresh(config), device)?;
    if adapted.is_empty() {
        return Err(Error::NoMatch {
            pattern: config.target.join(", "),
            available: last_names(&model.module_paths()),
        });
    }
    Ok(adapted)
}

/// Where updates come from.
#[derive(Clone, Copy)]
pub(super) enum UpdateSource<'a> {
    /// From a seed.
    Fresh(&'a LoraConfig),
    /// From a file.
    Stored(&'a AdapterWeights),
}

impl UpdateSource<'_> {
    fn linear(
        self,
        site: &UpdateSite<'_>,
        weight: &Weight,
    ) -> Result<Option<(Lora, AdaptedModule)>, Error> {
        match self {
            Self::Fresh(config) => config.linear(site, weight),
            Self::Stored(weights) => weights.linear(site, weight),
        }
    }

    /// The update of the embedding.
    fn embedding(
        self,
        site: &UpdateSite<'_>,
        weight: &Weight,
    ) -> Result<Option<(Lora, AdaptedModule)>, Error> {
        match self {
            Self::Fresh(config) => config.embedding(site, weight),
            Self::Stored(weights) => weights.linear(site, weight),
        }
    }

    /// Whether it changes the output head.
    fn changes_head(self) -> bool {
        match self {
            Self::Fresh(config) => config.adapts(HEAD),
            Self::Stored(weights) => weights.unties(),
        }
    }

    fn experts(
        self,
        site: &UpdateSite<'_>,
        experts: &Experts,
    ) -> Result<Option<ExpertUpdates>, Error> {
        match self {
            Self::Fresh(config) => config.experts(site, experts),
            Self::Stored(weights) => weights.experts(site, experts),
        }
    }
}

/// Puts an update on every module of a model that a source has one for.
pub(super) fn attach_all(
    model: &mut Model,
    source: UpdateSource<'_>,
    device: &Device,
) -> Result<Vec<AdaptedModule>, Error> {
    let mut adapted = Vec::new();
    let embedding = &mut model.model.embed_tokens;
    if model.lm_head.is_none() && source.changes_head() {
        // The head is what the embedding was, and its own from here on.
        model.lm_head = Some(Linear::new(embedding.weight.clone()));
    }
    let site = UpdateSite {
        path: EMBEDDING,
        number: 0,
        device,
    };
    if let Some((lora, module)) = source.embedding(&site, &embedding.weight)? {
        embedding.lora = Some(lora);
        adapted.push(module);
    } else if matches!(source, UpdateSource::Stored(_)) {
        embedding.lora = None;
    }
    for (number, (path, module)) in (1..).zip(model.modules_mut()) {
        let site = UpdateSite {
            path: &path,
            number,
            device,
        };
        match module {
            ModuleMut::Linear(linear) => {
                if let Some((lora, module)) = source.linear(&site, &linear.weight)? {
                    linear.lora = Some(lora);
                    adapted.push(module);
                } else if matches!(source, UpdateSource::Stored(_)) {
                    // A stored adapter is all that a model has; fresh updates join those of other modules.
                    linear.lora = None;
                }
            }
            ModuleMut::Experts(experts) => {
                if let Some(updates) = source.experts(&site, experts)? {
                    if let Some(subset) = updates.subset {
                        experts.restrict_updates(subset)?;
                    }
                    experts.lora = Some(updates.lora);
                    adapted.extend(updates.adapted);
                }
            }
        }
    }
    Ok(adapted)
}

/// Refuses a pattern that chooses nothing.
fn check_patterns(model: &Model, config: &LoraConfig) -> Result<(), Error> {
    let (modules, experts) = (model.module_paths(), model.expert_paths());
    let ranks = config.rank_pattern.iter().map(|(pattern, _)| pattern);
    let alphas = config.alpha_pattern.iter().map(|(pattern, _)| pattern);
    let of_modules = ranks.chain(alphas).map(|pattern| (pattern, false));
    let targets = config.target.iter().chain(&config.exclude);
    for (pattern, may_be_expert) in targets.map(|pattern| (pattern, true)).chain(of_modules) {
        let any = |paths: &[String]| paths.iter().any(|path| matches(pattern, path));
        let is_known = any(&modules) || (may_be_expert && any(&experts));
        if !is_known {
            return Err(Error::NoMatch {
                pattern: pattern.clone(),
                available: last_names(&modules),
            });
        }
    }
    Ok(())
}

fn last_names(modules: &[String]) -> String {
    let mut names: Vec<&str> = modules
        .iter()
        .filter_map(|module| module.rsplit('.').next())
        .collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}
