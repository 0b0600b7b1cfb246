//! Other programs' numbers against ours: of our outputs as the program writes them today (`tests/goldens/peers`, made by
//! `tests/peers/check.py`), and of files that those programs wrote (`tests/goldens/others`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use checkpoint::Safetensors;
use serde_json::Value;

use super::{golden, moeforge};

/// The outputs of this run, each made once.
struct Outputs {
    place: tempfile::TempDir,
    made: BTreeMap<String, PathBuf>,
}

impl Outputs {
    fn new() -> Self {
        Self {
            place: tempfile::tempdir().unwrap(),
            made: BTreeMap::new(),
        }
    }

    /// A model or an adapter's file, made by a verb with `--out`.
    fn make(&mut self, name: &str, words: &[&str]) -> PathBuf {
        let path = self.place.path().join(name);
        if self.made.insert(name.to_owned(), path.clone()).is_none() {
            let out = path.to_string_lossy().into_owned();
            ran(&[words, &["--out", &out]].concat());
        }
        path
    }

    /// The output that a line of the golden names, and the options of `logits` that read it.
    fn of(&mut self, line: &Value) -> (PathBuf, Vec<String>) {
        let path = |name: &str| golden("others").join(name);
        if let Some(name) = line["open"].as_str() {
            let adapter = line["adapter"].as_str().map(path);
            let adapter = adapter.map(|path| path.to_string_lossy().into_owned());
            let options = adapter.map(|adapter| vec!["--adapter".to_owned(), adapter]);
            return (path(name), options.unwrap_or_default());
        }
        let family = text(line, "family");
        let base = golden(family).to_string_lossy().into_owned();
        if let Some(name) = line["trained"].as_str() {
            let adapter = golden("peers").join(name);
            let options = vec!["--adapter".into(), adapter.to_string_lossy().into_owned()];
            return (PathBuf::from(base), options);
        }
        let adapter = |name: &str| format!("{base}/{name}");
        if let Some(name) = line["merge"].as_str() {
            let words = [
                "merge",
                &base,
                "--adapter",
                &adapter(name),
                "--dtype",
                text(line, "to"),
            ];
            return (self.make(&format!("{family}-{name}"), &words), vec![]);
        }
        if let Some(name) = line["exported"].as_str() {
            let words = ["export-adapter", &base, "--adapter", &adapter(name)];
            let file = self.make(&format!("{family}-{name}.gguf"), &words);
            let digest = checkpoint::sha256(&file).unwrap();
            assert_eq!(digest, text(line, "sha256"), "{}; {CURE}", file.display());
            let model = self.make(
                &format!("{family}-f32.gguf"),
                &["quantize", &base, "--to", "gguf:f32"],
            );
            return (model, vec!["--adapter".into(), adapter(name)]);
        }
        let (mut model, mut name) = (PathBuf::from(base), family.to_owned());
        for to in ["to", "then"].iter().filter_map(|key| line[*key].as_str()) {
            let (kind, format) = to.split_once(':').unwrap();
            name += &format!("-{format}");
            let name = if kind == "gguf" {
                format!("{name}.gguf")
            } else {
                name.clone()
            };
            model = self.make(&name, &["quantize", &model.to_string_lossy(), "--to", to]);
        }
        (model, vec![])
    }

    /// Our log-probabilities of a row of ids, by position, or the error.
    fn log_probabilities(
        &self,
        model: &Path,
        ids: &Value,
        options: &[String],
    ) -> Result<Vec<Vec<f64>>, String> {
        let at = |name: &str| self.place.path().join(name).to_string_lossy().into_owned();
        let (row, out, model) = (at("ids.json"), at("logits"), model.to_string_lossy());
        std::fs::write(&row, format!("{{\"input_ids\": [{ids}]}}")).unwrap();
        _ = std::fs::remove_file(&out);
        let words = ["logits", &model, "--ids", &row, "--out", &out];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let output = moeforge(&[&words[..], &options].concat());
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let file = Safetensors::open(Path::new(&out)).unwrap();
        let logits = file.tensor("logits").unwrap();
        let vocab_size = logits.shape[2];
        let values = logits.to_f32().unwrap();
        Ok(values.chunks(vocab_size).map(log_softmax).collect())
    }
}

const CURE: &str = "if the output was meant to change, read it again: python tests/peers/check.py MOEFORGE --write";

fn ran(words: &[&str]) {
    let output = moeforge(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
}

fn text<'a>(line: &'a Value, key: &str) -> &'a str {
    line[key].as_str().unwrap()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - largest).exp()).sum();
    let least = largest + sum.ln();
    logits.iter().map(|x| f64::from(*x) - least).collect()
}

/// The largest differences from what a reader found, at each position that the golden has.
fn differences(found: &[Vec<f64>], line: &Value) -> Vec<f64> {
    let at = |(position, likeliest): (&String, &Value)| {
        let ours = &found[position.parse::<usize>().unwrap()];
        let pairs = likeliest.as_array().unwrap().iter();
        pairs.fold(0.0, |most: f64, pair| {
            let token = pair[0].as_u64().unwrap() as usize;
            most.max((ours[token] - pair[1].as_f64().unwrap()).abs())
        })
    };
    let mut differences: Vec<f64> = line["top"].as_object().unwrap().iter().map(at).collect();
    differences.sort_by(f64::total_cmp);
    differences
}

/// The mean loss of the row from the golden's first position on.
fn loss(found: &[Vec<f64>], ids: &Value, line: &Value) -> f64 {
    let first = line["first"].as_u64().unwrap() as usize;
    let rest = first..found.len() - 1;
    let n = rest.len() as f64;
    let losses = rest.map(|i| -found[i][ids[i + 1].as_u64().unwrap() as usize]);
    losses.sum::<f64>() / n
}

/// How our numbers of an output differ from its reader's, if they do.
fn wrong(outputs: &mut Outputs, line: &Value, ids: &Value) -> Option<String> {
    let (model, mut options) = outputs.of(line);
    options.extend(["--compute".into(), text(line, "compute").to_owned()]);
    let name = format!("{} {options:?}", model.file_name().unwrap().display());
    let found = match outputs.log_probabilities(&model, ids, &options) {
        Ok(found) => found,
        // What is not read yet is refused by its name.
        Err(error)
            if line["may_refuse"]
                .as_str()
                .is_some_and(|key| error.contains(key)) =>
        {
            return None;
        }
        Err(error) => return Some(format!("{name}: {error}")),
    };
    let differences = differences(&found, line);
    let at_median = text(line, "at") == "median";
    let place = if at_median {
        differences.len() / 2
    } else {
        differences.len() - 1
    };
    let tolerance = line["tolerance"].as_f64().unwrap();
    let of_loss = (loss(&found, ids, line) - line["loss"].as_f64().unwrap()).abs();
    // NaN is neither.
    let is_equal = differences[place] <= tolerance && of_loss <= tolerance;
    (!is_equal).then(|| {
        let largest = differences[place];
        format!("{name}: {largest:.1e}, its loss {of_loss:.1e}, expected {tolerance}")
    })
}

/// Our numbers of every line of a golden, which has at least some.
fn check(name: &str, least: usize) {
    let golden: Value = serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap();
    let mut outputs = Outputs::new();
    let lines = golden["read"].as_array().unwrap();
    assert!(lines.len() >= least, "{}", lines.len());
    let of_line = |line| wrong(&mut outputs, line, &golden["rows"][text(line, "row")]);
    let wrong: Vec<String> = lines.iter().filter_map(of_line).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn others_read_our_outputs_as_we_do() {
    check("peers/read.json", 50);
}

#[test]
fn files_of_others_have_the_numbers_of_the_programs_that_wrote_them() {
    check("others/golden.json", 15);
}

/// Names and shapes of an adapter's tensors, and its config without the base.
fn form(adapter: &Path) -> (Value, BTreeMap<String, Vec<usize>>) {
    let config = std::fs::read(adapter.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["base_model_name_or_path"] = Value::Null;
    let file = Safetensors::open(&adapter.join("adapter_model.safetensors")).unwrap();
    let tensors = file.tensors().iter();
    let tensors = tensors.map(|tensor| (tensor.name.to_string(), tensor.shape.clone()));
    (config, tensors.collect())
}

#[test]
fn adapters_have_the_form_that_peft_read() {
    let golden_text = std::fs::read(golden("peers/read.json")).unwrap();
    let golden_json: Value = serde_json::from_slice(&golden_text).unwrap();
    let lines = golden_json["read"].as_array().unwrap();
    let trained = lines.iter().filter(|line| line["trained"].is_string());
    let place = tempfile::tempdir().unwrap();
    let row = "{\"prompt\": \"the\", \"completion\": \" end\"}\n";
    std::fs::write(place.path().join("train.jsonl"), row).unwrap();
    let mut n_checked = 0;
    for line in trained {
        let (family, name) = (text(line, "family"), text(line, "trained"));
        let recipe = format!(
            "model.path = {:?}\ndata.path = {:?}\nlora.rank = 2\nlora.alpha = 6\ntrain.steps = 1\n",
            golden(family),
            place.path()
        );
        let [path, run] =
            ["toml", "run"].map(|ending| place.path().join(format!("{family}.{ending}")));
        std::fs::write(&path, recipe).unwrap();
        ran(&[
            "train",
            &path.to_string_lossy(),
            "--out",
            &run.to_string_lossy(),
        ]);
        let [found, expected] =
            [run.join("adapter"), golden("peers").join(name)].map(|path| form(&path));
        assert_eq!(found, expected, "{family}; {CURE}");
        n_checked += 1;
    }
    assert!(n_checked >= 2);
}
