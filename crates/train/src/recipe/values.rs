//! How values of a recipe are read and written when serde's own way does not fit: words for the types of other crates, and
//! lists that may be a plain string.

use std::fmt;
use std::path::PathBuf;

use kernels::fp8::Scales;
use model::adapt::Share;
use model::{Checkpointing, OperandRounding};
use serde::de::{Error as _, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Value;

use super::KeepBest;

/// A type of another crate whose values have words in a recipe or on the command line.
pub(crate) trait SettingWords: Copy + PartialEq + 'static {
    /// Every word and its value.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of a value; none if it has none.
    fn word(self) -> Option<&'static str> {
        let mut words = Self::WORDS.iter();
        words
            .find(|(_, value)| *value == self)
            .map(|(word, _)| *word)
    }

    /// The value of a word, if it is one.
    fn find(word: &str) -> Option<Self> {
        let mut words = Self::WORDS.iter();
        words
            .find(|(known, _)| *known == word)
            .map(|(_, value)| *value)
    }

    /// The value of a word.
    fn of_word<E: serde::de::Error>(word: &str) -> Result<Self, E> {
        Self::find(word)
            .ok_or_else(|| E::custom(expected_words(Self::WORDS.iter().map(|(word, _)| *word))))
    }
}

impl SettingWords for OperandRounding {
    // The scales of `fp8` are those of the model, which is not open yet: see `Session::compute`.
    const WORDS: &'static [(&'static str, Self)] = &[
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("f16", Self::F16),
        ("fp8", Self::Fp8(Scales::F32)),
        ("fp8-unscaled", Self::Fp8(Scales::One)),
    ];
}

impl SettingWords for Checkpointing {
    const WORDS: &'static [(&'static str, Self)] = &[("none", Self::None), ("block", Self::Block)];
}

impl SettingWords for Share {
    const WORDS: &'static [(&'static str, Self)] =
        &[("A", Self::A), ("B", Self::B), ("outer", Self::Outer)];
}

/// In serde's own form, which the reader of the file turns into "expected …, found …".
fn expected_words(words: impl Iterator<Item = &'static str>) -> String {
    let quoted: Vec<String> = words.map(|word| format!("`{word}`")).collect();
    match quoted.as_slice() {
        [one, other] => format!("unknown variant, expected {one} or {other}"),
        all => format!("unknown variant, expected one of {}", all.join(", ")),
    }
}

/// A value by its word.
pub(super) mod word {
    use serde::ser::{Error as _, Serializer};
    use serde::{Deserialize, Deserializer};

    use super::SettingWords;

    pub(in crate::recipe) fn serialize<T: SettingWords, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let word = value.word();
        serializer.serialize_str(word.ok_or_else(|| S::Error::custom("no word of a recipe"))?)
    }

    pub(in crate::recipe) fn deserialize<'de, T: SettingWords, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        T::of_word(&String::deserialize(deserializer)?)
    }
}

impl<'de> Deserialize<'de> for KeepBest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Word;

        impl Visitor<'_> for Word {
            type Value = KeepBest;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or a task and its metric such as \"mmlu acc\"")
            }

            fn visit_bool<E>(self, is_on: bool) -> Result<KeepBest, E> {
                Ok(KeepBest::Loss(is_on))
            }

            fn visit_str<E: serde::de::Error>(self, names: &str) -> Result<KeepBest, E> {
                match names.split_whitespace().count() {
                    2 => Ok(KeepBest::Score(names.to_owned())),
                    _ => Err(E::invalid_value(Unexpected::Str(names), &self)),
                }
            }
        }

        deserializer.deserialize_any(Word)
    }
}

/// A value by its word, or nothing.
pub(super) mod optional_word {
    use serde::Deserializer;
    use serde::ser::Serializer;

    use super::{SettingWords, word};

    pub(in crate::recipe) fn serialize<T: SettingWords, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => word::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::recipe) fn deserialize<'de, T: SettingWords, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        word::deserialize(deserializer).map(Some)
    }
}

/// A quantizer by its name.
pub(super) mod quantizer {
    use kernels::Quantizer;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(in crate::recipe) fn serialize<S: Serializer>(
        quantizer: &Option<Quantizer>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match quantizer {
            Some(quantizer) => serializer.collect_str(quantizer),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::recipe) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Quantizer>, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map(Some).map_err(D::Error::custom)
    }
}

pub(super) fn one_or_more_paths<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<PathBuf>, D::Error> {
    let paths = one_or_more(deserializer, "a path or a list of paths")?;
    Ok(paths.into_iter().map(PathBuf::from).collect())
}

pub(super) fn one_or_more_patterns<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    one_or_more(deserializer, "a pattern or a list of patterns")
}

/// Reads a string, or a list of strings.
fn one_or_more<'de, D: Deserializer<'de>>(
    deserializer: D,
    expected: &str,
) -> Result<Vec<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let values = match value {
        Value::Array(values) => values,
        value => vec![value],
    };
    let texts = values.into_iter().map(|value| match value {
        Value::String(text) => Ok(text),
        value => Err(D::Error::invalid_type(
            Unexpected::Other(value.type_str()),
            &expected,
        )),
    });
    texts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Recipe;

    #[test]
    fn every_word_is_read_back_from_what_is_written() {
        for (word, compute) in OperandRounding::WORDS {
            let mut recipe = Recipe::default();
            recipe.precision.compute = *compute;
            let text = recipe.to_toml();
            assert!(text.contains(&format!("compute = \"{word}\"\n")), "{text}");
            assert_eq!(toml::from_str::<Recipe>(&text).unwrap(), recipe);
        }
        for (word, share) in Share::WORDS {
            assert_eq!(share.name(), *word);
            let mut recipe = Recipe::default();
            recipe.lora.experts_share = Some(*share);
            let text = recipe.to_toml();
            assert_eq!(toml::from_str::<Recipe>(&text).unwrap(), recipe);
        }
    }
}
