//! The `README.md` of a model or an adapter, as the Hugging Face Hub reads it: metadata in YAML, then Markdown.
//!
//! A card says what its caller knows and nothing else. Its bytes depend on that alone. Texts from files are quoted, so that
//! they stay texts in YAML and in Markdown.
//!
//! Source: huggingface/hub-docs: modelcard.md (the keys of the metadata).

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::cache::{Published, published};
use crate::{AdapterConfig, Notes, TargetModules, TrainableTokens};

/// The name of a card in its folder.
pub const CARD_NAME: &str = "README.md";

/// How a model came from its base, in the Hub's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// An adapter, which needs its base.
    Adapter,
    /// A whole model with other weights.
    Finetune,
}

/// A card being written.
#[derive(Clone, Debug, Default)]
pub struct ModelCard {
    metadata: String,
    body: String,
}

impl ModelCard {
    /// The program and its version.
    pub const PROGRAM: &str = concat!("moeforge ", env!("CARGO_PKG_VERSION"));

    /// A card with its metadata: the base, if it came from the Hub, how the model came from it, the base's license, and tags.
    pub fn new(base: Option<&Path>, relation: Relation, tags: &[&str]) -> Self {
        let mut card = Self::default();
        let (relation, library) = match relation {
            Relation::Adapter => ("adapter", "peft"),
            Relation::Finetune => ("finetune", "transformers"),
        };
        let published = base.and_then(published);
        if let Some(base) = &published {
            card.set("base_model", &base.repo);
            card.set("base_model_relation", relation);
        }
        card.set("library_name", library);
        for (key, value) in base.map(license_of).unwrap_or_default() {
            card.set(key, &value);
        }
        card.set("pipeline_tag", "text-generation");
        // PEFT names the base of an adapter among the tags too.
        let of_base = published.map(|base| format!("base_model:adapter:{}", base.repo));
        let of_base = of_base.filter(|_| library == "peft");
        let tags = of_base.as_deref().into_iter().chain(tags.iter().copied());
        card.list("tags", &tags.chain(["moeforge"]).collect::<Vec<_>>());
        card
    }

    /// Adds a section about the base, if there is one.
    pub fn base(&mut self, path: Option<&Path>) {
        let Some(path) = path else {
            return;
        };
        self.heading(2, "Base");
        let name = code(&model_label(path));
        self.paragraph(&match published(path) {
            Some(Published { repo, revision }) => {
                let revision = code(&revision);
                format!("[{name}](https://huggingface.co/{repo}) at revision {revision}.")
            }
            None => format!("{name}, which was not in the Hugging Face cache."),
        });
    }

    /// Sets a key of the metadata. Each may be set once.
    pub fn set(&mut self, key: &str, value: &str) {
        self.metadata += &format!("{key}: {}\n", yaml(value));
    }

    /// Sets a key of the metadata to a list.
    pub fn list(&mut self, key: &str, values: &[&str]) {
        self.metadata += &format!("{key}:\n");
        for value in values {
            self.metadata += &format!("- {}\n", yaml(value));
        }
    }

    /// Begins a section. `level` 1 is the title.
    pub fn heading(&mut self, level: usize, text: &str) {
        self.paragraph(&format!("{} {text}", "#".repeat(level)));
    }

    /// Adds Markdown, in which texts from files are [`code`].
    pub fn paragraph(&mut self, markdown: &str) {
        self.body += &format!("\n{markdown}\n");
    }

    /// Adds a table. The first row is its head.
    pub fn table(&mut self, rows: &[Vec<String>]) {
        self.body.push('\n');
        for (i, row) in rows.iter().enumerate() {
            // A bar ends a cell, even in code.
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            self.body += &format!("| {} |\n", cells.join(" | "));
            if i == 0 {
                self.body += &format!("|{}\n", "---|".repeat(row.len()));
            }
        }
    }

    /// Adds a file's text as it is.
    pub fn file(&mut self, language: &str, text: &str) {
        let fence = "`".repeat(longest_run(text).max(2) + 1);
        let end = if text.ends_with('\n') { "" } else { "\n" };
        self.paragraph(&format!("{fence}{language}\n{text}{end}{fence}"));
    }

    /// Adds the facts of an adapter's own files.
    pub fn adapter(&mut self, config: &AdapterConfig, notes: &Notes) {
        let mut rows = vec![vec!["setting".to_owned(), "value".to_owned()]];
        let mut add = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
        add("rank", config.r.to_string());
        add("alpha", config.lora_alpha.to_string());
        for (name, is_used) in [("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)] {
            if is_used {
                add(name, "yes".to_owned());
            }
        }
        let patterns = [
            ("ranks by module", listed(config.rank_pattern.iter())),
            ("alphas by module", listed(config.alpha_pattern.iter())),
        ];
        for (name, value) in patterns.into_iter().filter(|(_, value)| !value.is_empty()) {
            add(name, value);
        }
        if let Some(modules) = &config.target_modules {
            add("modules", codes_of(modules));
        }
        if let Some(names) = &config.target_parameters {
            add("stacked parameters", codes(names));
        }
        if let Some(modules) = &config.exclude_modules {
            add("modules left out", codes_of(modules));
        }
        if let Some(layers) = &config.layers_to_transform {
            let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
            add("layers", layers.join(", "));
        }
        if let Some(names) = &config.modules_to_save {
            add("modules stored whole", codes(names));
        }
        if let Some(tokens) = &config.trainable_token_indices {
            add("rows of single tokens", n_rows(tokens).to_string());
        }
        if let Some(format) = &notes.trained_for {
            add("trained to be merged and quantized to", code(format));
        }
        if let Some(share) = &notes.experts_share {
            add("factors that a layer's experts share", code(share));
        }
        if let Some(unread) = &notes.unread_by_peft {
            add("not read by PEFT", code(unread));
        }
        self.table(&rows);
    }

    /// The text of the file.
    pub fn to_text(&self) -> String {
        format!("---\n{}---\n{}", self.metadata, self.body)
    }
}

/// The name of a model: `org/name` if it came from the Hub, else the last name of its path.
pub fn model_label(path: &Path) -> String {
    if let Some(published) = published(path) {
        return published.repo;
    }
    // `.` has no name of its own; a link keeps the name that it was given by.
    let whole = || std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().map(OsStr::to_owned);
    let name = name.or_else(|| Some(whole().file_name()?.to_owned()));
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// A text as code in a line of Markdown, control characters replaced.
pub fn code(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    let fence = "`".repeat(longest_run(&text) + 1);
    // A space keeps backticks at the ends apart from the fence, and is not shown.
    let space = if fence.len() > 1 || text.is_empty() {
        " "
    } else {
        ""
    };
    format!("{fence}{space}{text}{space}{fence}")
}

/// The license that the card of a model's folder names, in the metadata's own keys. None if there is no card, or it names none
/// in plain words.
fn license_of(folder: &Path) -> Vec<(&'static str, String)> {
    const KEYS: [&str; 3] = ["license", "license_name", "license_link"];
    /// Metadata of real cards has a few thousand bytes.
    const LIMIT: u64 = 64 << 10;

    let mut text = Vec::new();
    let Ok(file) = File::open(folder.join(CARD_NAME)) else {
        return vec![];
    };
    if file.take(LIMIT).read_to_end(&mut text).is_err() {
        return vec![];
    }
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines();
    if lines.next() != Some("---") {
        return vec![];
    }
    let lines: Vec<&str> = lines.take_while(|line| *line != "---").collect();
    let value_of = |key: &'static str| {
        let value = lines
            .iter()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let value = value.trim().trim_matches(['"', '\'']);
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
        // A link into the base's own folder would lead nowhere from here.
        let is_usable = key != "license_link" || value.starts_with("https://");
        let is_usable = is_usable && !value.is_empty() && value.chars().all(is_plain);
        is_usable.then(|| (key, value.to_owned()))
    };
    KEYS.into_iter().filter_map(value_of).collect()
}

/// A YAML scalar: plain where it can be nothing but a text, else in quotes.
fn yaml(text: &str) -> String {
    /// Words that YAML reads as something else.
    const OTHER: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];

    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic());
    let reads_as_text = is_word && !OTHER.contains(&text.to_ascii_lowercase().as_str());
    if reads_as_text && text.chars().all(is_plain) {
        return text.to_owned();
    }
    // Strings of JSON are strings of YAML.
    serde_json::Value::from(text).to_string()
}

fn n_rows(tokens: &TrainableTokens) -> usize {
    match tokens {
        TrainableTokens::OfEmbedding(ids) => ids.len(),
        TrainableTokens::ByModule(modules) => modules.iter().map(|(_, ids)| ids.len()).sum(),
    }
}

fn codes_of(modules: &TargetModules) -> String {
    match modules {
        TargetModules::List(names) => codes(names),
        TargetModules::Regex(pattern) => code(pattern),
    }
}

fn codes(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| code(name)).collect();
    names.join(", ")
}

fn listed<'a, T: ToString + 'a>(pairs: impl Iterator<Item = (&'a str, &'a T)>) -> String {
    let pairs = pairs.map(|(pattern, value)| format!("{}: {}", code(pattern), value.to_string()));
    pairs.collect::<Vec<_>>().join(", ")
}

/// The length of the longest run of backticks.
fn longest_run(text: &str) -> usize {
    let runs = text.split(|c| c != '`').map(str::len);
    runs.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OrderedMap;

    #[test]
    fn texts_of_others_stay_texts() {
        let mut card = ModelCard::default();
        card.set("base_model", "acme/tiny");
        card.set("license", "no");
        card.list("tags", &["lora", "a: b\n---\nx"]);
        card.heading(1, &code("# `a` | b"));
        card.table(&[vec!["x".into()], vec![code("a|b\n``c")]]);
        card.file("toml", "a = '''\n````\n'''");
        let expected = "---\nbase_model: acme/tiny\nlicense: \"no\"\ntags:\n- lora\n- \"a: b\\n---\\nx\"\n---\n\
                        \n# `` # `a` | b ``\n\
                        \n| x |\n|---|\n| ``` a\\|b\u{fffd}``c ``` |\n\
                        \n`````toml\na = '''\n````\n'''\n`````\n";
        assert_eq!(card.to_text(), expected);
    }

    #[test]
    fn adapters_are_described_by_what_differs() {
        let text = |config: &AdapterConfig, notes: &Notes| {
            let mut card = ModelCard::default();
            card.adapter(config, notes);
            card.to_text()
        };
        let plain = text(&AdapterConfig::new(4, 8.0), &Notes::default());
        assert_eq!(
            plain,
            "---\n---\n\n| setting | value |\n|---|---|\n| rank | 4 |\n| alpha | 8 |\n"
        );
        let config = AdapterConfig {
            use_dora: true,
            rank_pattern: OrderedMap(vec![("q_.*".into(), 2)]),
            target_modules: Some(TargetModules::List(vec!["q_proj".into(), "o_proj".into()])),
            modules_to_save: Some(vec!["lm_head".into()]),
            trainable_token_indices: Some(TrainableTokens::OfEmbedding(vec![1, 5, 6])),
            ..AdapterConfig::new(4, 8.5)
        };
        let notes = Notes {
            trained_for: Some("gguf:q4_0".into()),
            experts_share: None,
            unread_by_peft: Some("DoRA on `x`".into()),
        };
        let text = text(&config, &notes);
        for row in [
            "| alpha | 8.5 |",
            "| DoRA | yes |",
            "| ranks by module | `q_.*`: 2 |",
            "| modules | `q_proj`, `o_proj` |",
            "| trained to be merged and quantized to | `gguf:q4_0` |",
            "| modules stored whole | `lm_head` |",
            "| rows of single tokens | 3 |",
            "| not read by PEFT | `` DoRA on `x` `` |",
        ] {
            assert!(text.contains(&format!("\n{row}\n")), "{row}: {text}");
        }
        assert!(!text.contains("rsLoRA"), "{text}");
    }

    #[test]
    fn the_license_is_the_one_that_a_card_names_in_plain_words() {
        let folder = tempfile::tempdir().unwrap();
        let license = |card: &str| {
            std::fs::write(folder.path().join(CARD_NAME), card).unwrap();
            license_of(folder.path())
        };
        let other = "---\nlicense: other\nlicense_name: 'deepseek'\nlicense_link: https://x.org/LICENSE\n---\nlicense: mit\n";
        let expected = [
            ("license", "other"),
            ("license_name", "deepseek"),
            ("license_link", "https://x.org/LICENSE"),
        ];
        assert_eq!(
            license(other),
            expected.map(|(key, value)| (key, value.to_owned()))
        );
        let inside = license("---\nlicense: mit\nlicense_link: LICENSE\n---\n");
        assert_eq!(inside, [("license", "mit".to_owned())]);
        for none in [
            "",
            "license: mit\n",
            "---\nlicense:\n- mit\n---\n",
            "---\nlicense: a b\n",
        ] {
            assert_eq!(license(none), [], "{none}");
        }
        assert_eq!(license_of(&folder.path().join("absent")), []);
    }
}
