//! Which settings may change when a run is resumed.
//!
//! A setting is free if it decides nothing that the steps already made depend on: where files are (what they contain is
//! checked), the end of the run and the learning rates of the steps to come, what is measured and kept. Every other one is
//! part of the run, and is saved with each of its checkpoints.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::{Table, Value};

use super::Recipe;

/// The free settings.
const FREE: [&str; 27] = [
    "model.path",
    "model.config",
    "model.tokenizer",
    "model.adapter",
    "data.path",
    "optimizer.learning_rate",
    "schedule.kind",
    "schedule.warmup_steps",
    "schedule.final_ratio",
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.max_rollbacks",
    "train.checkpointing",
    "eval.batch_size",
    "eval.patience",
    "eval.prompts",
    "eval.generate_every",
    "eval.max_new_tokens",
    "eval.chat",
    "eval.tasks",
    "eval.tasks_every",
    "eval.tasks_max_samples",
    "eval.gates",
];

impl Recipe {
    /// The settings that a run keeps, as TOML: `section.key` to the value.
    pub(crate) fn kept_settings(&self) -> String {
        let table: Table = self.settings().into_iter().collect();
        toml::to_string(&table).expect("settings that came from TOML can be written as TOML")
    }

    /// The settings that differ from those of a run, as [`Recipe::kept_settings`] wrote them.
    ///
    /// # Errors
    /// If they are no TOML.
    pub(crate) fn changes_from(&self, kept: &str) -> Result<Vec<String>, toml::de::Error> {
        let before: BTreeMap<String, Value> = kept.parse::<Table>()?.into_iter().collect();
        Ok(changes(&before, &self.settings()))
    }

    /// The settings that differ from those of another recipe and may not change during a run.
    pub(crate) fn refused_changes(&self, before: &Self) -> Vec<String> {
        // A run has its own copy of the adapter that it began with: another one would have no effect.
        let with_adapter = |recipe: &Self| {
            let mut settings = recipe.settings();
            let path = recipe.model.adapter.as_ref();
            let path = path.map(|path| Value::String(path.display().to_string()));
            settings.extend(path.map(|path| ("model.adapter".to_owned(), path)));
            settings
        };
        changes(&with_adapter(before), &with_adapter(self))
    }

    /// Makes the paths that differ from those of another recipe absolute, if they exist.
    ///
    /// # Errors
    /// If there is no current directory.
    pub(crate) fn make_absolute(&mut self, before: &Self) -> crate::Result<()> {
        let absolute = |path: &mut PathBuf| -> crate::Result<()> {
            if path.exists() {
                *path = std::path::absolute(&*path).map_err(crate::error::io("find", path))?;
            }
            Ok(())
        };
        if self.model.path != before.model.path
            && let Some(path) = &mut self.model.path
        {
            let mut place = PathBuf::from(&*path);
            absolute(&mut place)?;
            *path = place.to_string_lossy().into_owned();
        }
        let paths = [
            (&mut self.model.config, &before.model.config),
            (&mut self.model.tokenizer, &before.model.tokenizer),
        ];
        let changed = paths.into_iter().filter(|(now, before)| now != before);
        changed
            .filter_map(|(now, _)| now.as_mut())
            .try_for_each(absolute)?;
        if self.data.path != before.data.path {
            self.data.path.iter_mut().try_for_each(absolute)?;
        }
        Ok(())
    }

    /// The settings that are part of a run, by their names.
    fn settings(&self) -> BTreeMap<String, Value> {
        let table: Table = self
            .to_toml()
            .parse()
            .expect("what was written as TOML is TOML");
        let mut settings = BTreeMap::new();
        for (section, keys) in table {
            for (key, value) in keys.as_table().cloned().unwrap_or_default() {
                let name = format!("{section}.{key}");
                // A spike goes back to a multiple of `save_every`.
                let is_anchor = name == "train.save_every" && self.train.spike_factor > 0.0;
                if is_anchor || !FREE.contains(&name.as_str()) {
                    settings.insert(name, value);
                }
            }
        }
        settings
    }
}

/// The settings that differ, with both values.
fn changes(before: &BTreeMap<String, Value>, now: &BTreeMap<String, Value>) -> Vec<String> {
    let mut keys: Vec<&String> = before.keys().chain(now.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let shown = |value: Option<&Value>| match value {
        Some(value) => format!("`{}`", crate::error::shown(&value.to_string())),
        None => "none".to_owned(),
    };
    let differing = keys
        .into_iter()
        .filter(|key| before.get(*key) != now.get(*key));
    let change = |key: &String| {
        let [before, now] = [before, now].map(|settings| shown(settings.get(key)));
        format!("{key}, which was {before} and is {now}")
    };
    differing.map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::super::keys;
    use super::*;

    #[test]
    fn every_free_setting_exists() {
        for name in FREE {
            let (section, key) = name.split_once('.').unwrap();
            keys::check_key("here", section, key).unwrap();
        }
    }

    #[test]
    fn what_a_run_keeps_is_named_with_both_values_and_the_rest_is_free() {
        let mut before = Recipe::default();
        before.resolve();
        let mut now = before.clone();
        (now.train.steps, now.train.epochs) = (Some(9), None);
        now.data.path = vec!["elsewhere".into()];
        now.optimizer.learning_rate = 1e-5;
        assert_eq!(now.refused_changes(&before), [""; 0]);
        assert_eq!(now.kept_settings(), before.kept_settings());

        now.lora.rank = 16;
        now.train.router = Some(super::super::RouterTraining::Frozen);
        let changes = now.changes_from(&before.kept_settings()).unwrap();
        assert_eq!(changes, now.refused_changes(&before));
        let expected = [
            "lora.rank, which was `8` and is `16`",
            "train.router, which was none and is `\"frozen\"`",
        ];
        assert_eq!(changes, expected);
        assert!(now.changes_from("no = toml = file").is_err());
    }

    #[test]
    fn the_distance_of_checkpoints_is_kept_where_a_spike_goes_back_to_one() {
        let mut before = Recipe::default();
        before.train.save_every = Some(10);
        let mut now = before.clone();
        now.train.save_every = Some(5);
        assert_eq!(now.refused_changes(&before), [""; 0]);
        (before.train.spike_factor, now.train.spike_factor) = (2.0, 2.0);
        let expected = ["train.save_every, which was `10` and is `5`"];
        assert_eq!(now.refused_changes(&before), expected);
    }
}
