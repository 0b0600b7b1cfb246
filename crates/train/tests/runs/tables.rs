//! Runs on tables: the bits of runs on the same rows in JSON lines, and resumed like these.

use std::path::{Path, PathBuf};

use crate::{Place, bytes, losses, open, resumed_run_is_whole_in};
use moeforge_train::{Recipe, RunDir};

fn table(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens/tables")
        .join(name)
}

/// A place whose training split is one file, and validation split another one.
fn place(rows: &[u8], name: &str) -> Place {
    let place = Place::new("deepseek_v3");
    std::fs::remove_file(place.path("train.jsonl")).unwrap();
    std::fs::write(place.path(&format!("train{name}")), rows).unwrap();
    std::fs::write(place.path(&format!("validation{name}")), rows).unwrap();
    place
}

const SETTINGS: &str =
    "[train]\nmethod = \"lora\"\nsteps = 6\nbatch_size = 2\nsave_every = 2\nkeep_last = 9\n";

#[test]
fn runs_on_tables_are_those_on_lines_and_resume() {
    let lines = std::fs::read_to_string(table("ids.jsonl")).unwrap();
    let parquet = std::fs::read(table("ids.parquet")).unwrap();
    let rows: Vec<serde_json::Value> = lines
        .lines()
        .map(|row| serde_json::from_str(row).unwrap())
        .collect();
    let list = serde_json::to_vec_pretty(&rows).unwrap();
    let fields = rows
        .iter()
        .map(|row| format!("\"{}\",\"{}\"\n", row["input_ids"], row["labels"]));
    let csv = format!("input_ids,labels\n{}", fields.collect::<String>());
    let expected = place(lines.as_bytes(), ".jsonl");
    resumed_run_is_whole_in(&expected, SETTINGS, "adapter");
    for (name, file) in [
        (".parquet", parquet),
        (".json", list),
        (".csv", csv.into_bytes()),
    ] {
        let place = place(&file, name);
        resumed_run_is_whole_in(&place, SETTINGS, "adapter");
        let adapter = |place: &Place| bytes(&place.path("whole/adapter"));
        assert_eq!(adapter(&place), adapter(&expected), "{name}");
    }
}

#[test]
fn shards_are_one_split_and_names_of_columns_are_obeyed() {
    let lines = std::fs::read_to_string(table("ids.jsonl")).unwrap();
    let renamed = lines.replace("\"input_ids\"", "\"tokens\"");
    let place = place(b"{}", ".jsonl");
    std::fs::remove_file(place.path("train.jsonl")).unwrap();
    std::fs::remove_file(place.path("validation.jsonl")).unwrap();
    let at = renamed.match_indices('\n').nth(3).unwrap().0 + 1;
    let (first, second) = renamed.split_at(at);
    std::fs::write(place.path("train-00001-of-00002.jsonl"), second).unwrap();
    std::fs::write(place.path("train-00000-of-00002.jsonl"), first).unwrap();
    std::fs::write(place.path("extra.csv"), "").unwrap();
    let settings = format!("{SETTINGS}shuffle = false\n");
    drop(place.recipe("# deepseek_v3\n", &settings));
    let overrides = ["data.columns.input_ids=tokens".to_owned()];
    let recipe = Recipe::open(&place.path("recipe.toml"), &overrides).unwrap();
    let mut session = open(recipe.clone());
    assert_eq!(session.train.unused_files, [place.path("extra.csv")]);
    assert_eq!(session.train.corpus.len(), 10);
    let ids = |row: usize| session.train.corpus.sample(row).unwrap().ids[..2].to_vec();
    assert_eq!([ids(0), ids(4), ids(9)], [[0, 1], [28, 29], [63, 64]]);
    let run = RunDir::create(&place.path("run"), &recipe).unwrap();
    assert_eq!(losses(&mut session, &run).len(), 6);
    // The run's own recipe has the names too.
    assert_eq!(run.recipe().unwrap().data.columns, recipe.data.columns);
}
