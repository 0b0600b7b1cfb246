use std::fs;
use std::path::Path;

use super::{FULL, LEAST, open};
use crate::Recipe;
use crate::recipe::file::MAX_BYTES;

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
        "train.keep_best = 'mmlu'",
        "train.keep_best: expected true, false, or a task and its metric such as \"mmlu acc\", found \"mmlu\"",
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
        &["eval.tasks_every=10"],
        "r.toml: eval.tasks: expected at least one, because `eval.tasks_every` is given, found none",
    ),
    (
        LEAST,
        &["train.keep_best='mmlu acc'"],
        "r.toml: eval.tasks: expected at least one, because `train.keep_best` is given, found none",
    ),
    (
        LEAST,
        &["train.keep_best='mmlu acc'", "eval.tasks=['mmlu.yaml']"],
        "r.toml: eval.tasks_every: expected a number, because `train.keep_best` names a task, found none",
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
        "--set train.unfrozen_parameters=['experts']: train.unfrozen_parameters: expected none with `train.method = \"lora\"`, because an adapter holds no weights, found [\"experts\"]",
    ),
    (
        LEAST,
        &["train.method=full", "train.router=bias-only"],
        "r.toml: train.bias_update_speed: expected a number above 0, such as 1e-3, because `train.router` is `bias-only`, found 0",
    ),
    (
        LEAST,
        &["train.router=bias-only"],
        "--set train.router=bias-only: train.router: expected `frozen` or `trainable` with `train.method = \"lora\"`, because an adapter holds no bias, found \"bias-only\"",
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
