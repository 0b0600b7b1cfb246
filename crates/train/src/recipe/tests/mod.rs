//! Recipes that are read, with their defaults, overrides and paths.

/// Recipes that are refused, with what the error says.
mod refused;

use std::fs;
use std::path::Path;

use model::OperandRounding;

use super::*;
use crate::Result;

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
    expected.optimizer.moments = Some(Moments::F32);
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
    assert_eq!(recipe.precision.compute, OperandRounding::Bf16);
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
    assert_eq!(recipe.precision.compute, OperandRounding::Bf16);
    assert!(!recipe.train.shuffle);
    assert_eq!(recipe.optimizer.learning_rate, 1.0);
}

#[test]
fn entries_of_tables_are_overridden_one_by_one() {
    let text = format!("{LEAST}columns = {{ prompt = \"q\", completion = \"a\" }}\n");
    let overrides = [
        "data.columns.prompt=question",
        "data.columns.text = x.y",
        "lora.rank_pattern.layers.0.*=4",
    ];
    let recipe = open(&text, &overrides).unwrap();
    let names = recipe
        .data
        .columns
        .iter()
        .map(|(key, column)| (key, column.as_str()));
    let expected = [("prompt", "question"), ("completion", "a"), ("text", "x.y")];
    assert_eq!(names.collect::<Vec<_>>(), expected);
    assert_eq!(recipe.lora.rank_pattern.0, [("layers.0.*".to_owned(), 4)]);
    let problem = open(&text, &["data.columns.promt=question"]).unwrap_err();
    assert!(
        problem.starts_with(
            "--set data.columns.promt=question: data.columns.promt: expected keys of rows ("
        ),
        "{problem}"
    );
    assert!(
        problem.ends_with("found `promt`; did you mean `prompt`?"),
        "{problem}"
    );
    let problem = open(LEAST, &["data.columns.prompt=7"]).unwrap_err();
    assert!(problem.contains("data.columns: expected "), "{problem}");
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
fn the_number_of_steps_is_given_or_follows_from_the_rows() {
    let check = |steps, epochs, n_rows, expected| {
        let mut recipe = Recipe::default();
        recipe.train.batch_size = 4;
        recipe.train.accumulate = 3;
        recipe.train.steps = steps;
        recipe.train.epochs = epochs;
        assert_eq!(recipe.total_steps(n_rows), expected, "{steps:?} {epochs:?}");
    };
    check(Some(7), None, 1000, 7);
    check(None, Some(1.0), 24, 2);
    check(None, Some(1.0), 25, 3);
    check(None, Some(0.5), 25, 2);
    check(None, Some(0.001), 1, 1);
    check(None, None, 12, 1);
}
