//! The names of a recipe's sections and keys, and suggestions for misspelled ones.
//!
//! The names come from the structs themselves, so that there is no second list.

use serde::de::value::Error as NoValue;
use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

use crate::error::shown;
use crate::recipe::{
    DataSection, DpoSection, EvalSection, LoraSection, ModelSection, OptimizerSection,
    PrecisionSection, ScheduleSection, TrainSection,
};
use crate::{Error, Result};

/// A section's name and its keys.
type Section = (&'static str, &'static [&'static str]);

fn sections() -> [Section; 9] {
    [
        ("model", fields::<ModelSection>()),
        ("data", fields::<DataSection>()),
        ("lora", fields::<LoraSection>()),
        ("precision", fields::<PrecisionSection>()),
        ("optimizer", fields::<OptimizerSection>()),
        ("schedule", fields::<ScheduleSection>()),
        ("train", fields::<TrainSection>()),
        ("dpo", fields::<DpoSection>()),
        ("eval", fields::<EvalSection>()),
    ]
}

/// Whether there is a section of that name.
pub(crate) fn is_section(name: &str) -> bool {
    sections().iter().any(|(section, _)| *section == name)
}

/// Checks that there is a section of that name. `place` is its place in the recipe.
///
/// # Errors
/// If there is none.
pub(crate) fn check_section(place: &str, name: &str) -> Result<()> {
    if is_section(name) {
        return Ok(());
    }
    let names: Vec<&str> = sections().iter().map(|(section, _)| *section).collect();
    let hint = match nearest(name, &names) {
        Some(section) => format!("did you mean `[{section}]`?"),
        None => one_of(names.iter().map(|name| format!("`[{name}]`"))),
    };
    let found = format!("section `[{}]`", shown(name));
    Err(unknown(place, found, hint))
}

/// Checks that the section has a key of that name. `place` is its place in the recipe.
///
/// # Errors
/// If it has none.
pub(crate) fn check_key(place: &str, section: &str, key: &str) -> Result<()> {
    check_section(place, section)?;
    let sections = sections();
    let keys = sections.iter().find(|(name, _)| *name == section);
    let keys = keys.map_or(&[][..], |(_, keys)| keys);
    if keys.contains(&key) {
        return Ok(());
    }
    let hint = match nearest(key, keys) {
        Some(key) => format!("did you mean `{section}.{key}`?"),
        None => elsewhere(key)
            .unwrap_or_else(|| one_of(keys.iter().map(|key| format!("`{section}.{key}`")))),
    };
    let found = format!("key `{section}.{}`", shown(key));
    Err(unknown(place, found, hint))
}

/// The error for a key before the first section.
pub(crate) fn outside(place: &str, key: &str) -> Error {
    let hint = elsewhere(key).unwrap_or_else(|| "expected every key in a section".to_owned());
    let found = format!("key `{}` outside of any section", shown(key));
    unknown(place, found, hint)
}

/// A hint if another section has this key, or one that is much like it.
fn elsewhere(key: &str) -> Option<String> {
    let owner = |key: &str| {
        let sections = sections();
        let owner = sections.iter().find(|(_, keys)| keys.contains(&key));
        owner.map(|(section, _)| format!("did you mean `{section}.{key}`?"))
    };
    owner(key).or_else(|| {
        let all: Vec<&str> = sections()
            .iter()
            .flat_map(|(_, keys)| *keys)
            .copied()
            .collect();
        owner(nearest(key, &all)?)
    })
}

/// The most similar name, if it is similar enough.
fn nearest<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    // Below it come words that share only a few letters; above it, every typo of one letter.
    const ALIKE: f64 = 0.8;
    // The longest name is half of this, and a megabyte would take its time.
    const MAX_KEY_BYTES: usize = 40;
    if name.len() > MAX_KEY_BYTES {
        return None;
    }
    let scored = candidates
        .iter()
        .map(|&candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

fn one_of(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.collect();
    format!("expected one of {}", names.join(", "))
}

fn unknown(place: &str, found: String, hint: String) -> Error {
    Error::Unknown {
        place: place.to_owned(),
        found,
        hint,
    }
}

/// The names of a struct's fields, as serde reads them.
fn fields<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // The deserializer has no value: it records the names of the fields and fails.
    let _ = T::deserialize(FieldNames(&mut fields));
    fields
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = NoValue;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, NoValue> {
        *self.0 = fields;
        Err(NoValue::custom("only the names of the fields are wanted"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, NoValue> {
        Err(NoValue::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        option unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Recipe;

    #[test]
    fn every_section_of_the_recipe_is_known_with_its_keys() {
        let names: Vec<&str> = sections().iter().map(|(name, _)| *name).collect();
        assert_eq!(names, fields::<Recipe>());
        assert_eq!(sections()[8].1[..2], ["batch_size", "max_batches"]);
        assert!(sections().iter().all(|(_, keys)| !keys.is_empty()));
    }

    #[test]
    fn the_documented_keys_are_all_keys_with_their_defaults() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/README.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (_, keys) = text.split_once("\n## Every key\n").unwrap();
        let block = keys.split("```toml\n").nth(1).unwrap();
        let block = block.split("```").next().unwrap();
        let documented: Recipe = toml::from_str(block).unwrap();
        assert_eq!(documented, Recipe::default());
        let mut parts = block.split("\n[").map(|part| part.trim_start_matches('['));
        for (section, keys) in sections() {
            let part = parts.next().unwrap_or_default();
            let (name, lines) = part.split_once(']').unwrap();
            assert_eq!(name, section);
            let found: Vec<&str> = lines
                .lines()
                .filter_map(|line| Some(line.trim_start_matches("# ").split_once(" = ")?.0))
                .collect();
            assert_eq!(found, keys, "[{section}]");
        }
    }

    #[test]
    fn a_wrong_key_is_looked_for_in_its_section_and_then_elsewhere() {
        let check = |section, key, expected: &str| {
            let error = check_key("x", section, key).unwrap_err().to_string();
            assert_eq!(error, expected);
        };
        check(
            "lora",
            "rnak",
            "x: unknown key `lora.rnak`, did you mean `lora.rank`?",
        );
        check(
            "schedule",
            "warmup",
            "x: unknown key `schedule.warmup`, did you mean `schedule.warmup_steps`?",
        );
        check(
            "lora",
            "learning_rate",
            "x: unknown key `lora.learning_rate`, did you mean `optimizer.learning_rate`?",
        );
        check(
            "model",
            "epoch",
            "x: unknown key `model.epoch`, did you mean `train.epochs`?",
        );
        check(
            "precision",
            "zzz",
            "x: unknown key `precision.zzz`, expected one of `precision.compute`, `precision.round_start`, `precision.loss_scale`, `precision.loss_scale_growth_interval`",
        );
        check(
            "optimiser",
            "eps",
            "x: unknown section `[optimiser]`, did you mean `[optimizer]`?",
        );
    }

    #[test]
    fn a_long_or_unprintable_key_is_shortened_and_escaped() {
        let error = check_key("x", "lora", &"\u{1b}[2J".repeat(1 << 20)).unwrap_err();
        let message = error.to_string();
        assert!(
            message.len() < 1000 && !message.contains('\u{1b}'),
            "{message}"
        );
    }
}
