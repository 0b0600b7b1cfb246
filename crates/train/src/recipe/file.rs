//! Reads a recipe: TOML, overrides, and what each error says about where a setting was written.
//!
//! The file becomes a table, overrides replace entries of it, and the whole becomes a
//! [`Recipe`]. Beside the table goes a note of the line or override that every key came from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::check::Problem;
use super::keys;
use crate::error::{io, shown};
use crate::{Error, Recipe, Result};

/// The longest recipe. Real ones have a thousand bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The keys that hold paths.
const PATHS: [&str; 5] = [
    "model.path",
    "model.config",
    "model.tokenizer",
    "model.adapter",
    "data.path",
];

/// Keys that exclude each other: an override of one removes the other, if only the file has it.
const RIVALS: [(&str, &str); 2] = [
    ("model.path", "model.config"),
    ("train.steps", "train.epochs"),
];

impl Recipe {
    /// Reads a recipe and replaces settings of it by `overrides`, each `section.key=value`.
    ///
    /// The value of an override is TOML, or else taken as a string: `lora.rank=4`,
    /// `train.method=full`, `lora.target=["q_a_proj", "experts"]`. Of two overrides of a key
    /// the last counts. An override of `train.steps` removes `train.epochs`, one of `model.path`
    /// removes `model.config`, and the other way round.
    ///
    /// Relative paths are relative to the current directory, as on the command line. One in the
    /// file that starts with `./` or `../` is relative to the file. The result has no such path,
    /// so a saved recipe means the same wherever it lies.
    ///
    /// # Errors
    /// If the file cannot be read or is no TOML, or a setting is unknown, of a wrong type, out of
    /// range or missing. The message names file and line, or the override.
    pub fn open(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut draft = Draft::parse(path, &read(path)?)?;
        for assignment in overrides {
            draft.assign(assignment)?;
        }
        draft.finish()
    }
}

fn read(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(io("open", path))?;
    let mut text = String::new();
    // One byte more than allowed shows that there is more.
    file.take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(io("read", path))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(Error::TooLong {
            path: path.to_owned(),
            limit_bytes: MAX_BYTES,
        });
    }
    Ok(text)
}

/// A recipe before it has types.
struct Draft {
    path: PathBuf,
    table: Table,
    /// `section.key` to where it was written.
    places: BTreeMap<String, String>,
    overridden: BTreeSet<String>,
}

impl Draft {
    fn parse(path: &Path, text: &str) -> Result<Self> {
        // A byte-order mark is no part of the text; the parser agrees, but counts it.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let place = |offset: usize| {
            let line = text.bytes().take(offset).filter(|&b| b == b'\n').count() + 1;
            format!("{}:{line}", path.display())
        };
        let syntax = |error: toml::de::Error| Error::Syntax {
            place: place(error.span().map_or(0, |span| span.start)),
            problem: shown(error.message()),
        };
        let mut draft = Self {
            path: path.to_owned(),
            table: text.parse().map_err(syntax)?,
            places: BTreeMap::new(),
            overridden: BTreeSet::new(),
        };
        let spans = DeTable::parse(text).map_err(syntax)?;
        for (section, keys) in spans.get_ref() {
            let section_place = place(section.span().start);
            let section = section.get_ref();
            let DeValue::Table(keys) = keys.get_ref() else {
                let value = draft.table.get(&**section);
                return Err(no_section(section_place, section, value));
            };
            keys::check_section(&section_place, section)?;
            for key in keys.keys() {
                let key_place = place(key.span().start);
                keys::check_key(&key_place, section, key.get_ref())?;
                draft
                    .places
                    .insert(format!("{section}.{}", key.get_ref()), key_place);
            }
        }
        draft.resolve_paths()?;
        Ok(draft)
    }

    /// Makes the file's paths relative to the current directory.
    fn resolve_paths(&mut self) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("")).to_owned();
        for (section, keys) in &mut self.table {
            let Value::Table(keys) = keys else { continue };
            for (key, value) in keys {
                let key = format!("{section}.{key}");
                if PATHS.contains(&key.as_str()) {
                    let place = self.places.get(&key).cloned().unwrap_or_default();
                    resolve(value, &folder).map_err(|problem| problem.at(place, &key))?;
                }
            }
        }
        Ok(())
    }

    /// Replaces a setting.
    fn assign(&mut self, assignment: &str) -> Result<()> {
        let malformed = || Error::Override {
            found: shown(assignment),
        };
        let (name, value) = assignment.split_once('=').ok_or_else(malformed)?;
        let name = name.trim();
        let (section, key) = name.split_once('.').ok_or_else(malformed)?;
        let place = format!("--set {}", shown(assignment));
        keys::check_key(&place, section, key)?;
        let mut value = parse_value(value.trim());
        if PATHS.contains(&name) {
            resolve(&mut value, Path::new(""))
                .map_err(|problem| problem.at(place.clone(), name))?;
        }

        for (one, other) in RIVALS {
            let rival = match name {
                _ if name == one => other,
                _ if name == other => one,
                _ => continue,
            };
            if !self.overridden.contains(rival) {
                self.remove(rival);
            }
        }
        let section = self
            .table
            .entry(section)
            .or_insert_with(|| Value::Table(Table::new()));
        // Every other value was refused when the file was read.
        if let Value::Table(keys) = section {
            keys.insert(key.to_owned(), value);
        }
        self.overridden.insert(name.to_owned());
        self.places.insert(name.to_owned(), place);
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        let keys = name.split_once('.').and_then(|(section, key)| {
            let keys = self.table.get_mut(section)?.as_table_mut()?;
            Some((keys, key))
        });
        if let Some((keys, key)) = keys {
            keys.remove(key);
        }
    }

    fn finish(self) -> Result<Recipe> {
        let mut recipe: Recipe = match self.table.clone().try_into() {
            Ok(recipe) => recipe,
            Err(error) => return Err(self.wrong_type(&error)),
        };
        recipe.resolve();
        recipe.check().map_err(|problem| self.locate(problem))?;
        Ok(recipe)
    }

    /// Finds the setting that made the whole fail, by trying each alone: all others have
    /// defaults.
    fn wrong_type(&self, whole: &toml::de::Error) -> Error {
        for (section, keys) in &self.table {
            for (key, value) in keys.as_table().into_iter().flatten() {
                let alone = Table::from_iter([(key.clone(), value.clone())]);
                let alone = Table::from_iter([(section.clone(), Value::Table(alone))]);
                if let Err(error) = alone.try_into::<Recipe>() {
                    return self.locate(Problem {
                        key: format!("{section}.{key}"),
                        expected: expected(error.message()),
                        found: String::new(), // the value as written
                    });
                }
            }
        }
        Error::Syntax {
            place: self.path.display().to_string(),
            problem: shown(whole.message()),
        }
    }

    fn locate(&self, problem: Problem) -> Error {
        // A pattern of a table is not noted, but its table is.
        let mut parts = problem.key.splitn(3, '.');
        let (section, key) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let place = match self.places.get(&format!("{section}.{key}")) {
            Some(place) => place.clone(),
            None => self.path.display().to_string(),
        };
        // As it was written, if it was.
        let written = self.table.get(section).and_then(|keys| keys.get(key));
        let written = written.filter(|_| parts.next().is_none());
        Error::Setting {
            place,
            key: shown(&problem.key),
            expected: problem.expected,
            found: written.map_or(problem.found, |value| shown(&value.to_string())),
        }
    }
}

/// The error for a value where only sections can be.
fn no_section(place: String, name: &str, value: Option<&Value>) -> Error {
    if !keys::is_section(name) {
        return keys::outside(&place, name);
    }
    Error::Setting {
        place,
        key: name.to_owned(),
        expected: format!("a section `[{name}]`"),
        found: value.map_or_else(String::new, |value| shown(&value.to_string())),
    }
}

/// Reads the value of an override.
fn parse_value(text: &str) -> Value {
    let as_string = || Value::String(text.to_owned());
    let Ok(mut table) = format!("value = {text}").parse::<Table>() else {
        return as_string();
    };
    match table.remove("value") {
        // No setting is a date, but a folder may be named after one. And a line break could
        // start a second setting.
        Some(Value::Datetime(_)) | None => as_string(),
        Some(_) if !table.is_empty() => as_string(),
        Some(value) => value,
    }
}

/// Why a path was refused.
enum PathProblem {
    NotUtf8,
    NoCurrentDirectory(std::io::Error),
}

impl PathProblem {
    fn at(self, place: String, key: &str) -> Error {
        let found = match self {
            Self::NotUtf8 => "a folder with another name".to_owned(),
            Self::NoCurrentDirectory(cause) => {
                return io("read", Path::new("."))(cause);
            }
        };
        Error::Setting {
            place,
            key: key.to_owned(),
            expected: "a path that is UTF-8 together with the recipe's folder".to_owned(),
            found,
        }
    }
}

/// Makes the paths of a value that start with `./` or `../` relative to the current directory
/// instead of `folder`. Values of wrong types stay, to be refused with the others.
fn resolve(value: &mut Value, folder: &Path) -> Result<(), PathProblem> {
    match value {
        Value::Array(values) => values
            .iter_mut()
            .try_for_each(|value| resolve(value, folder)),
        Value::String(text) => {
            *text = resolve_path(text, folder)?;
            Ok(())
        }
        _ => Ok(()),
    }
}

fn resolve_path(text: &str, folder: &Path) -> Result<String, PathProblem> {
    let starts_with_dots = |path: &Path| {
        let first = path.components().next();
        matches!(first, Some(Component::CurDir | Component::ParentDir))
    };
    if !starts_with_dots(Path::new(text)) {
        return Ok(text.to_owned());
    }
    let joined = folder.join(text);
    let mut path: PathBuf = joined
        .components()
        .filter(|&component| component != Component::CurDir)
        .collect();
    // What still starts with dots would mean another place when it is read from the run
    // directory.
    if path.as_os_str().is_empty() || starts_with_dots(&path) {
        path = std::env::current_dir()
            .map_err(PathProblem::NoCurrentDirectory)?
            .join(path);
    }
    path.into_os_string()
        .into_string()
        .map_err(|_| PathProblem::NotUtf8)
}

/// What was expected, in plain words, from the message of a deserializer.
fn expected(message: &str) -> String {
    // The message of an entry of a table goes on with where it is.
    let first_line = message.lines().next().unwrap_or_default();
    let tail = first_line.rsplit_once("expected ").map(|(_, tail)| tail);
    let words = match tail {
        Some("usize" | "u64") => "a non-negative whole number",
        Some("f64") => "a number",
        Some("a boolean") => "`true` or `false`",
        Some("path string") => "a path",
        Some("an object" | "a map") => "a table",
        Some("a sequence") => "a list",
        Some("an array of length 2" | "fewer elements in array") => "a list of 2 numbers",
        Some("string only") => "a string",
        Some(words) => words,
        None => first_line,
    };
    words.to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::recipe::{Compute, Method};

    /// Opens a recipe of this text, named `r.toml`, in a folder of its own.
    fn open(text: &str, overrides: &[&str]) -> Result<Recipe, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.toml");
        fs::write(&path, text).unwrap();
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let prefix = format!("{}/", folder.path().display());
        Recipe::open(&path, &overrides).map_err(|error| error.to_string().replace(&prefix, ""))
    }

    const LEAST: &str = "[model]\npath = \"m\"\n[data]\npath = \"d\"\n";

    const FULL: &str = r#"
        [model]
        config = "config.json"
        tokenizer = "tok"
        [data]
        path = ["a", "b"]
        max_length = 64
        [lora]
        rank = 2
        alpha = 3
        target = "experts"
        exclude = ["layers.0.*"]
        use_rslora = true
        rank_pattern = { zeta = 5, "experts.down_proj" = 4, "layers.3.*" = 6 }
        [precision]
        compute = "bf16"
        [optimizer]
        betas = [0.95, 0.1]
        eps = 1e-15
        [schedule]
        kind = "linear"
        [train]
        method = "full"
        steps = 12
        seed = 9223372036854775807
        eval_every = 3
        [eval]
        max_batches = 2
        [lora.alpha_pattern]
        b = 0.30000000000000004
        a = 2
    "#;

    #[test]
    fn a_short_recipe_has_defaults_and_an_epoch() {
        let recipe = open(LEAST, &[]).unwrap();
        let mut expected = Recipe::default();
        expected.model.path = Some("m".to_owned());
        expected.data.path = vec!["d".into()];
        expected.train.epochs = Some(1.0);
        expected.optimizer.moments = Some(crate::Moments::F32);
        assert_eq!(recipe, expected);
    }

    #[test]
    fn the_resolved_recipe_reads_back_equal() {
        for text in [LEAST, FULL] {
            let recipe = open(text, &[]).unwrap();
            let resolved = recipe.to_toml();
            assert_eq!(open(&resolved, &[]).unwrap(), recipe, "{resolved}");
            assert_eq!(open(&resolved, &[]).unwrap().to_toml(), resolved);
        }
        let recipe = open(FULL, &[]).unwrap();
        let ranks: Vec<_> = recipe.lora.rank_pattern.iter().collect();
        let expected = [("zeta", &5), ("experts.down_proj", &4), ("layers.3.*", &6)];
        assert_eq!(ranks, expected, "the order of the file is kept");
        assert_eq!(recipe.lora.alpha_pattern.0[0].1, 0.1 + 0.2);
        assert_eq!(recipe.precision.compute, Compute::Bf16);
        assert_eq!(recipe.train.method, Method::Full);
        assert_eq!(recipe.lora.target, ["experts"]);
    }

    #[test]
    fn overrides_replace_settings_and_their_rivals() {
        let overrides = [
            "train.steps = 7",
            "lora.rank=1",
            "lora.rank=3",
            "lora.target=[\"q_a_proj\", 'experts']",
            "lora.rank_pattern={ experts = 2 }",
            "model.path=org/name",
            "data.path=2024-01-31",
            "precision.compute=bf16",
            "train.shuffle=false",
            "optimizer.learning_rate=1",
        ];
        let text = FULL
            .replace("steps = 12", "epochs = 2.5")
            .replace("\"full\"", "\"lora\"");
        let recipe = open(&text, &overrides).unwrap();
        assert_eq!((recipe.train.steps, recipe.train.epochs), (Some(7), None));
        assert_eq!(recipe.model.path.as_deref(), Some("org/name"));
        assert_eq!(recipe.model.config, None);
        assert_eq!(recipe.lora.rank, 3);
        assert_eq!(recipe.lora.target, ["q_a_proj", "experts"]);
        assert_eq!(recipe.lora.rank_pattern.0, [("experts".to_owned(), 2)]);
        assert_eq!(recipe.data.path, [Path::new("2024-01-31")]);
        assert_eq!(recipe.precision.compute, Compute::Bf16);
        assert!(!recipe.train.shuffle);
        assert_eq!(recipe.optimizer.learning_rate, 1.0);
    }

    #[test]
    fn paths_with_dots_are_relative_to_the_recipe_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("recipes")).unwrap();
        let path = folder.path().join("recipes/r.toml");
        fs::write(
            &path,
            "[model]\npath = './base'\nadapter = 'x/../y'\n[data]\npath = ['../d', '/e', '.f']\n",
        )
        .unwrap();
        let recipe = Recipe::open(&path, &[]).unwrap();
        let base = folder.path().join("recipes/base");
        assert_eq!(recipe.model.path.as_deref(), base.to_str());
        assert_eq!(recipe.model.adapter.as_deref(), Some(Path::new("x/../y")));
        let up = folder.path().join("recipes/../d");
        assert_eq!(
            recipe.data.path,
            [up.as_path(), Path::new("/e"), Path::new(".f")]
        );

        let recipe = Recipe::open(
            &path,
            &["model.path=./b".to_owned(), "data.path=../d".to_owned()],
        );
        let recipe = recipe.unwrap();
        assert_eq!(recipe.model.path.as_deref(), Some("b"));
        let up = std::env::current_dir().unwrap().join("../d");
        assert_eq!(recipe.data.path, [up]);
    }

    #[test]
    fn a_bad_line_is_named_with_what_was_expected_and_found() {
        for (line, expected) in BAD_LINES {
            let text = format!("model.path = 'm'\ndata.max_length = 8\n{line}\ndata.path = 'd'\n");
            let found = open(&text, &[]).unwrap_err();
            assert_eq!(found, format!("r.toml:3: {expected}"), "{line}");
        }
    }

    const BAD_LINES: &[(&str, &str)] = &[
        (
            "lora.rank = 0",
            "lora.rank: expected a whole number of at least 1, found 0",
        ),
        (
            "lora.rank = -1",
            "lora.rank: expected a non-negative whole number, found -1",
        ),
        (
            "lora.rank = 8.0",
            "lora.rank: expected a non-negative whole number, found 8.0",
        ),
        (
            "lora.rank = 'eight'",
            "lora.rank: expected a non-negative whole number, found \"eight\"",
        ),
        (
            "lora.rank = [8]",
            "lora.rank: expected a non-negative whole number, found [8]",
        ),
        (
            "lora.alpha = 0",
            "lora.alpha: expected a finite number above 0, found 0",
        ),
        (
            "lora.alpha = nan",
            "lora.alpha: expected a finite number above 0, found nan",
        ),
        (
            "lora.alpha = '16'",
            "lora.alpha: expected a number, found \"16\"",
        ),
        (
            "lora.dropout = 1.0",
            "lora.dropout: expected a number of at least 0 and below 1, found 1.0",
        ),
        (
            "lora.target = []",
            "lora.target: expected at least one pattern, found []",
        ),
        (
            "lora.target = ['a', '']",
            "lora.target: expected no empty pattern, found [\"a\", \"\"]",
        ),
        (
            "lora.target = 3",
            "lora.target: expected a pattern or a list of patterns, found 3",
        ),
        (
            "lora.exclude = ['a', 1]",
            "lora.exclude: expected a pattern or a list of patterns, found [\"a\", 1]",
        ),
        (
            "lora.use_rslora = 1",
            "lora.use_rslora: expected `true` or `false`, found 1",
        ),
        (
            "lora.rank_pattern = 4",
            "lora.rank_pattern: expected a table, found 4",
        ),
        (
            "lora.rank_pattern = { a = 4, 'b.c' = 0 }",
            "lora.rank_pattern.b.c: expected a whole number of at least 1, found 0",
        ),
        (
            "lora.rank_pattern = { a = 'x' }",
            "lora.rank_pattern: expected a non-negative whole number, found { a = \"x\" }",
        ),
        (
            "lora.alpha_pattern.a = -inf",
            "lora.alpha_pattern.a: expected a finite number above 0, found -inf",
        ),
        (
            "model.adapter = ''",
            "model.adapter: expected no empty path, found \"\"",
        ),
        (
            "model.tokenizer = true",
            "model.tokenizer: expected a path, found true",
        ),
        (
            "precision.compute = 'fp4'",
            "precision.compute: expected one of `f32`, `bf16`, `f16`, `fp8`, `fp8-unscaled`, found \"fp4\"",
        ),
        (
            "precision.compute = 16",
            "precision.compute: expected a string, found 16",
        ),
        (
            "optimizer.learning_rate = 0",
            "optimizer.learning_rate: expected a finite number above 0, found 0",
        ),
        (
            "optimizer.betas = [0.9]",
            "optimizer.betas: expected a list of 2 numbers, found [0.9]",
        ),
        (
            "optimizer.betas = [0.9, 0.99, 0.999]",
            "optimizer.betas: expected a list of 2 numbers, found [0.9, 0.99, 0.999]",
        ),
        (
            "optimizer.betas = [0.9, 1]",
            "optimizer.betas: expected a number of at least 0 and below 1, found [0.9, 1]",
        ),
        (
            "optimizer.betas = 0.9",
            "optimizer.betas: expected a list of 2 numbers, found 0.9",
        ),
        (
            "optimizer.eps = 0.0",
            "optimizer.eps: expected a finite number above 0, found 0.0",
        ),
        (
            "optimizer.weight_decay = -1e-9",
            "optimizer.weight_decay: expected a finite number of at least 0, found -0.000000001",
        ),
        (
            "optimizer.clip = inf",
            "optimizer.clip: expected a finite number of at least 0, found inf",
        ),
        (
            "schedule.kind = 'cosin'",
            "schedule.kind: expected one of `constant`, `linear`, `cosine`, found \"cosin\"",
        ),
        (
            "schedule.warmup_steps = -1",
            "schedule.warmup_steps: expected a non-negative whole number, found -1",
        ),
        (
            "schedule.final_ratio = 1.5",
            "schedule.final_ratio: expected a number from 0 to 1, found 1.5",
        ),
        (
            "train.method = 'qlora'",
            "train.method: expected `lora` or `full`, found \"qlora\"",
        ),
        (
            "train.steps = 0",
            "train.steps: expected a whole number of at least 1, found 0",
        ),
        (
            "train.epochs = 0",
            "train.epochs: expected a finite number above 0, found 0",
        ),
        (
            "train.seed = -1",
            "train.seed: expected a non-negative whole number, found -1",
        ),
        (
            "train.seed = 9223372036854775808",
            "u64 value was too large",
        ),
        (
            "train.shuffle = 'yes'",
            "train.shuffle: expected `true` or `false`, found \"yes\"",
        ),
        (
            "train.save_every = 0",
            "train.save_every: expected a whole number of at least 1, found 0",
        ),
        (
            "train.keep_last = 0",
            "train.keep_last: expected a whole number of at least 1, found 0",
        ),
        (
            "train.balance_loss = -1",
            "train.balance_loss: expected a finite number of at least 0, found -1",
        ),
        (
            "train.spike_factor = 1",
            "train.spike_factor: expected 0, or a finite number above 1, found 1",
        ),
        (
            "eval.patience = 0",
            "eval.patience: expected a whole number of at least 1, found 0",
        ),
        (
            "eval.prompts = ['']",
            "eval.prompts: expected no empty prompt, found [\"\"]",
        ),
        (
            "eval.max_batches = 0",
            "eval.max_batches: expected a whole number of at least 1, found 0",
        ),
        (
            "lora.rnk = 8",
            "unknown key `lora.rnk`, did you mean `lora.rank`?",
        ),
        (
            "model.seed = 8",
            "unknown key `model.seed`, did you mean `train.seed`?",
        ),
        (
            "schedule.xyz = 8",
            "unknown key `schedule.xyz`, expected one of `schedule.kind`, `schedule.warmup_steps`, `schedule.final_ratio`",
        ),
        (
            "loar.rank = 8",
            "unknown section `[loar]`, did you mean `[lora]`?",
        ),
        (
            "rank = 8",
            "unknown key `rank` outside of any section, did you mean `lora.rank`?",
        ),
        (
            "speed = 8",
            "unknown key `speed` outside of any section, did you mean `train.seed`?",
        ),
        ("lora = 8", "lora: expected a section `[lora]`, found 8"),
        (
            "lora.rank = ",
            "string values must be quoted, expected literal string",
        ),
        (
            "lora.rank = eight",
            "string values must be quoted, expected literal string",
        ),
        (
            "lora.rank = 8 8",
            "string values must be quoted, expected literal string",
        ),
        ("model.path = 'other'", "duplicate key"),
        (
            "\"a\\u001b[2J\" = 8",
            "unknown key `a\\u{1b}[2J` outside of any section, expected every key in a section",
        ),
    ];

    #[test]
    fn a_recipe_that_lacks_something_or_has_it_twice_is_refused() {
        for (text, overrides, expected) in BAD_WHOLES {
            let found = open(text, overrides).unwrap_err();
            assert_eq!(found, *expected, "{text:?} {overrides:?}");
        }
    }

    const BAD_WHOLES: &[(&str, &[&str], &str)] = &[
        (
            "",
            &[],
            "r.toml: model: expected either `path` or `config`, found neither",
        ),
        (
            "model.path = 'm'",
            &[],
            "r.toml: data.path: expected at least one folder, found none",
        ),
        (
            "model = { path = 'm' }\ndata.path = []",
            &[],
            "r.toml:2: data.path: expected at least one folder, found []",
        ),
        (
            "model.path = 'm'\ndata.path = 'd'\ntrain = { steps = 1, epochs = 1 }",
            &[],
            "r.toml: train: expected either `steps` or `epochs`, found both",
        ),
        (
            "model.path = 'm'\ndata.path = 'd'\ntrain.steps = 1\nschedule.warmup_steps = 2",
            &[],
            "r.toml:4: schedule.warmup_steps: expected at most `train.steps`, which is 1, found 2",
        ),
        (
            FULL,
            &["model.path=m", "model.config=c"],
            "r.toml: model: expected either `path` or `config`, found both",
        ),
        (
            LEAST,
            &["train.steps=1", "train.epochs=1"],
            "r.toml: train: expected either `steps` or `epochs`, found both",
        ),
        (
            LEAST,
            &["model.adapter=a", "train.method=full"],
            "--set train.method=full: train.method: expected `lora`, because `model.adapter` is given, found \"full\"",
        ),
        (
            LEAST,
            &["lora.rank"],
            "--set: expected `section.key=value`, found `lora.rank`",
        ),
        (
            LEAST,
            &["rank=8"],
            "--set: expected `section.key=value`, found `rank=8`",
        ),
        (
            LEAST,
            &["lora.rank=eight"],
            "--set lora.rank=eight: lora.rank: expected a non-negative whole number, found \"eight\"",
        ),
        (
            LEAST,
            &["lora.rank="],
            "--set lora.rank=: lora.rank: expected a non-negative whole number, found \"\"",
        ),
        (
            LEAST,
            &["lora.rank=8\nalpha=2"],
            "--set lora.rank=8\\nalpha=2: lora.rank: expected a non-negative whole number, found \"\"\"\\n8\\nalpha=2\"\"\"",
        ),
        (
            LEAST,
            &["lora.rank_pattern.experts=8"],
            "--set lora.rank_pattern.experts=8: unknown key `lora.rank_pattern.experts`, did you mean `lora.rank_pattern`?",
        ),
        (
            LEAST,
            &["train.rank=8"],
            "--set train.rank=8: unknown key `train.rank`, did you mean `lora.rank`?",
        ),
        (
            LEAST,
            &["optimizer.clip=-1"],
            "--set optimizer.clip=-1: optimizer.clip: expected a finite number of at least 0, found -1",
        ),
        (
            LEAST,
            &["train.unfrozen_parameters=['experts']"],
            "--set train.unfrozen_parameters=['experts']: train.unfrozen_parameters: expected none with `train.method = \"lora\"`, whose adapter holds no weights, found [\"experts\"]",
        ),
        (
            LEAST,
            &["train.method=full", "train.router=bias-only"],
            "r.toml: train.bias_update_speed: expected a number above 0, such as 1e-3, because `train.router` is `bias-only`, found 0",
        ),
        (
            LEAST,
            &["train.router=bias-only"],
            "--set train.router=bias-only: train.router: expected `frozen` or `trainable` with `train.method = \"lora\"`, whose adapter holds no bias, found \"bias-only\"",
        ),
        (
            LEAST,
            &["lora.loraplus_lr_ratio=0"],
            "--set lora.loraplus_lr_ratio=0: lora.loraplus_lr_ratio: expected a finite number above 0, found 0",
        ),
        (
            "[model\npath = 'm'",
            &[],
            "r.toml:1: unclosed table, expected `]`",
        ),
    ];

    #[test]
    fn a_file_that_is_no_recipe_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let check = |path: &Path, expected: &str| {
            let error = Recipe::open(path, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&folder.path().join("absent.toml"), "cannot open `");
        check(folder.path(), "cannot read `");
        let path = folder.path().join("r.toml");
        fs::write(&path, b"a = '\xff'").unwrap();
        check(&path, "did not contain valid UTF-8");
        fs::write(&path, " ".repeat(MAX_BYTES as usize + 1)).unwrap();
        check(&path, "expected at most 1048576 bytes, found more");
    }
}
