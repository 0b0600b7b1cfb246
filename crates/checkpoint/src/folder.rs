//! A model: a Hugging Face folder, or a GGUF as the folder it was converted from; its configuration and the tensors of
//! all its files.
//!
//! The index says which tensor is in which shard; names of shards are never constructed. Tokenizers and chat templates in the
//! folder are not read here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::{io, shown};
use crate::file::is_present;
use crate::gguf::origin::GgufOrigin;
use crate::gguf::{Gguf, malformed, settings};
use crate::json::{self, CONFIG_LIMIT, INDEX_LIMIT};
use crate::{Error, OrderedMap, Result, Safetensors, Tensor};

/// The file that says which tensor is in which shard.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The only shard of a folder without an index.
pub(crate) const SINGLE_NAME: &str = "model.safetensors";

/// Maximum number of tensors in a GGUF, counting each expert's matrices (DeepSeek-V3 has 46 thousand): a small file must not
/// become a large list of names.
const MOST_TENSORS: usize = 1 << 18;

/// An opened model. All files are mapped; opening copies nothing.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    config: Value,
    generation_config: Option<Value>,
    shards: Vec<Shard>,
    /// Tensor name to its shard, and its place in the shard.
    place_of: BTreeMap<String, [usize; 2]>,
    unindexed: Vec<Tensor>,
    /// Of a GGUF: its metadata, and the folder that it was converted from.
    gguf: Option<(BTreeMap<String, Value>, GgufOrigin)>,
    companions: Option<Companions>,
}

/// Makes a GGUF's companions, the other files that a model folder has, as names and contents, from its path and metadata.
pub type Companions =
    fn(
        &Path,
        &BTreeMap<String, Value>,
    ) -> std::result::Result<Vec<(String, String)>, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Clone, Debug)]
struct Shard {
    name: String,
    /// In the order of their bytes.
    tensors: Vec<Tensor>,
}

/// The part of an index that is used. Its `metadata` is free text, and wrong in some models.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: OrderedMap<String>,
}

impl Folder {
    /// Opens a folder: reads `config.json`, maps every shard, checks every header and the index. Or a GGUF file, whose
    /// tensors get the names and the order of rows of the folder that it was converted from.
    ///
    /// # Errors
    /// If `config.json` or the weights are absent or malformed, or the index and the shards
    /// disagree; if a GGUF is malformed or of an unsupported architecture.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Self::open_gguf(path);
        }
        let config = read_json(&path.join("config.json"))?;
        let generation_config = path.join("generation_config.json");
        let generation_config = if is_present(&generation_config)? {
            Some(read_json(&generation_config)?)
        } else {
            None
        };
        let mut folder = Self {
            path: path.to_owned(),
            config,
            generation_config,
            shards: Vec::new(),
            place_of: BTreeMap::new(),
            unindexed: Vec::new(),
            gguf: None,
            companions: None,
        };
        let index = path.join(INDEX_NAME);
        if is_present(&index)? {
            folder.open_indexed(&index)?;
        } else {
            folder.open_single(find_single(path)?)?;
        }
        Ok(folder)
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let origin = GgufOrigin::of(path, &gguf)?;
        let zeros = origin.absent_biases(path, &gguf)?;
        let mut folder = Self {
            path: path.to_owned(),
            config: origin.config.clone(),
            generation_config: settings::generation_config(&gguf.metadata),
            shards: Vec::new(),
            place_of: BTreeMap::new(),
            unindexed: Vec::new(),
            gguf: Some((gguf.metadata, origin.clone())),
            companions: None,
        };
        let (n_files, mut zeros) = (gguf.files.len(), zeros);
        for (n, (file, stored)) in gguf.files.into_iter().enumerate() {
            let mut tensors = std::mem::take(&mut zeros);
            for tensor in stored {
                tensors.extend(origin.parts(tensor)?);
                if folder.place_of.len() + tensors.len() > MOST_TENSORS {
                    let problem = format!("expected at most {MOST_TENSORS} tensors, found more");
                    return Err(malformed(&file, problem));
                }
            }
            for (i, tensor) in tensors.iter().enumerate() {
                let place = [folder.shards.len(), i];
                if let Some([first, _]) = folder.place_of.insert(tensor.name.to_string(), place) {
                    return Err(Error::DuplicateTensor {
                        tensor: tensor.name.to_string(),
                        first: folder
                            .shards
                            .get(first)
                            .and_then(|shard| shard.tensors.first())
                            .map_or_else(|| file.clone(), |tensor| tensor.file.to_path_buf()),
                        second: file,
                    });
                }
            }
            // The name of what a folder has in its place.
            let name = match n_files {
                1 => SINGLE_NAME.to_owned(),
                _ => format!("model-{:05}-of-{n_files:05}.safetensors", n + 1),
            };
            folder.shards.push(Shard { name, tensors });
        }
        Ok(folder)
    }

    /// The path of the folder, or of the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files with the tensors, each once.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        let tensors = self.shards.iter().flat_map(|shard| &shard.tensors);
        let files: BTreeSet<PathBuf> = tensors.map(|tensor| tensor.file.to_path_buf()).collect();
        files.into_iter().collect()
    }

    /// The file with the configuration, for messages.
    pub fn config_path(&self) -> PathBuf {
        match self.gguf {
            Some(_) => self.path.clone(),
            None => self.path.join("config.json"),
        }
    }

    /// The metadata of a GGUF: numbers, texts, and lists of them, by their keys. None for a folder.
    pub fn metadata(&self) -> Option<&BTreeMap<String, Value>> {
        self.gguf.as_ref().map(|gguf| &gguf.0)
    }

    /// The keys of a GGUF's metadata that nothing here knows, those of its tokenizer left out.
    pub fn unknown_metadata(&self) -> &[String] {
        self.gguf.as_ref().map_or(&[], |gguf| &gguf.1.unknown)
    }

    /// Sets the function that makes a GGUF's companions: the tokenizer's files, for exports.
    #[must_use]
    pub fn with_companions(mut self, companions: Companions) -> Self {
        self.companions = Some(companions);
        self
    }

    /// Names and contents of a GGUF's companions; none without [`Folder::with_companions`].
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn companions(&self) -> Result<Vec<(String, String)>> {
        match (self.companions, self.metadata()) {
            (Some(make), Some(metadata)) => {
                make(&self.path, metadata).map_err(|cause| Error::Companions { cause })
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The content of `config.json`, an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The content of `generation_config.json`, an object, if there is one; of a GGUF, its recommended sampling.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.place_of.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.place_of.contains_key(name)
    }

    /// The tensor of that name, as a slice of its file's map, or as a copy if a GGUF has its rows in another order.
    ///
    /// # Errors
    /// If there is none, or its rows cannot be put in order.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self.stored(name)?.clone();
        match &self.gguf {
            Some((_, origin)) => origin.restore(tensor),
            None => Ok(tensor),
        }
    }

    /// The tensor of that name with its rows in the order of the file: for its dtype, shape and size.
    ///
    /// # Errors
    /// If there is none.
    pub fn stored(&self, name: &str) -> Result<&Tensor> {
        let place = self.place_of.get(name);
        place
            .map(|[shard, i]| &self.shards[*shard].tensors[*i])
            .ok_or_else(|| self.absent(name))
    }

    /// The error of a tensor that there is not, or not under that name.
    fn absent(&self, name: &str) -> Error {
        let (path, tensor) = (self.path.clone(), name.to_owned());
        match self.names().find(|found| is_wrapped(found, name)) {
            Some(found) => Error::WrappedTensor {
                path,
                tensor,
                found: shown(found),
            },
            None => Error::NoTensor { path, tensor },
        }
    }

    /// The shards, sorted by file name: the file name, and the names of its tensors in the order
    /// of their bytes.
    pub fn shards(&self) -> Vec<(&str, Vec<&str>)> {
        let shards = self.shards.iter();
        shards
            .map(|shard| {
                let names = shard.tensors.iter().map(|tensor| &*tensor.name);
                let indexed = names.filter(|name| self.contains(name)).collect();
                (shard.name.as_str(), indexed)
            })
            .collect()
    }

    /// Tensors that are in a shard and not in the index. They are not part of the model; callers should report them.
    pub fn unindexed(&self) -> &[Tensor] {
        &self.unindexed
    }

    /// The size of all tensors, in bytes.
    pub fn tensor_bytes(&self) -> u64 {
        let shards = self.shards.iter();
        let tensors = shards.flat_map(|shard| &shard.tensors);
        let indexed = tensors.filter(|tensor| self.contains(&tensor.name));
        indexed.map(|tensor| tensor.bytes.len() as u64).sum()
    }

    fn open_single(&mut self, name: String) -> Result<()> {
        let file = Safetensors::open(&self.path.join(&name))?;
        let names = file.tensors().iter().map(|tensor| tensor.name.to_string());
        self.place_of = names.enumerate().map(|(i, name)| (name, [0, i])).collect();
        let tensors = file.tensors().to_vec();
        self.shards = vec![Shard { name, tensors }];
        Ok(())
    }

    fn open_indexed(&mut self, index_path: &Path) -> Result<()> {
        let text = json::read_object(index_path, INDEX_LIMIT)?;
        let index: ShardIndex = json::parse(index_path, &text)?;
        // A shard's name, and its first tensor for messages.
        let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
        for (tensor, name) in index.weight_map.iter() {
            shards.entry(name).or_insert(tensor);
        }
        let mut position = BTreeMap::new();
        for (name, tensor) in shards {
            position.insert(name.to_owned(), self.shards.len());
            let file = open_shard(index_path, name, tensor)?;
            let tensors = file.tensors().to_vec();
            let name = name.to_owned();
            self.shards.push(Shard { name, tensors });
        }
        let places: Vec<HashMap<&str, usize>> = self.shards.iter().map(Shard::places).collect();
        for (tensor, name) in index.weight_map.0 {
            let shard = position[&name];
            let Some(i) = places[shard].get(tensor.as_str()) else {
                return Err(Error::ShardLacks {
                    index: index_path.to_owned(),
                    tensor: shown(&tensor),
                    file: index_path.with_file_name(name),
                });
            };
            self.place_of.insert(tensor, [shard, *i]);
        }
        self.find_unindexed()
    }

    /// Finds tensors in the shards that are not in the index.
    fn find_unindexed(&mut self) -> Result<()> {
        for (i, shard) in self.shards.iter().enumerate() {
            for tensor in &shard.tensors {
                match self.place_of.get(&*tensor.name) {
                    Some([indexed, _]) if *indexed == i => {}
                    Some([indexed, _]) => {
                        return Err(Error::DuplicateTensor {
                            tensor: tensor.name.to_string(),
                            first: self.path.join(&self.shards[*indexed].name),
                            second: tensor.file.to_path_buf(),
                        });
                    }
                    None => self.unindexed.push(tensor.clone()),
                }
            }
        }
        Ok(())
    }
}

impl Shard {
    /// Where each tensor is.
    fn places(&self) -> HashMap<&str, usize> {
        let names = self.tensors.iter().map(|tensor| &*tensor.name);
        names.enumerate().map(|(i, name)| (name, i)).collect()
    }
}

/// Opens the shard of that name in the folder of the index.
fn open_shard(index_path: &Path, name: &str, tensor: &str) -> Result<Safetensors> {
    if !is_plain_file_name(name) {
        return Err(Error::FileName {
            place: index_path.to_owned(),
            found: shown(name),
        });
    }
    let file = index_path.with_file_name(name);
    if !is_present(&file)? {
        return Err(Error::ShardAbsent {
            index: index_path.to_owned(),
            tensor: shown(tensor),
            file,
        });
    }
    Safetensors::open(&file)
}

/// Whether a name is one of a file in the same folder, on every operating system.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}

fn read_json(path: &Path) -> Result<Value> {
    let text = json::read_object(path, CONFIG_LIMIT)?;
    json::parse(path, &text)
}

/// The weight file of a folder without an index.
fn find_single(folder: &Path) -> Result<String> {
    let mut weights = Vec::new();
    let mut foreign = Vec::new();
    for entry in fs::read_dir(folder).map_err(io("read", folder))? {
        let entry = entry.map_err(io("read", folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == SINGLE_NAME {
            return Ok(name);
        }
        let extension = Path::new(&name)
            .extension()
            .and_then(|extension| extension.to_str());
        match extension {
            Some("safetensors") if name != "adapter_model.safetensors" => weights.push(name),
            Some("safetensors" | "bin" | "gguf" | "pt" | "pth") => foreign.push(name),
            _ => {}
        }
    }
    if weights.len() > 1 {
        return Err(Error::NoIndex {
            folder: folder.to_owned(),
            found: listed(weights),
        });
    }
    weights.pop().ok_or_else(|| Error::NoWeights {
        folder: folder.to_owned(),
        found: listed(foreign),
    })
}

/// Whether two names are of the same tensor, inside of a wrapper and outside: of a compiled or a distributed model, of one with
/// an adapter on it, of one that sees and reads.
fn is_wrapped(found: &str, name: &str) -> bool {
    const WRAPPERS: [&str; 8] = [
        "model",
        "language_model",
        "text_model",
        "_orig_mod",
        "module",
        "base_model",
        "base_layer",
        "original_module",
    ];
    let parts = |name: &str| {
        let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
        parts.map(str::to_owned).collect::<Vec<_>>()
    };
    parts(found) == parts(name)
}

/// The first few names, for a message.
pub(crate) fn listed(mut names: Vec<String>) -> String {
    const SHOWN_NAMES: usize = 4;
    names.sort();
    let n_more = names.len().saturating_sub(SHOWN_NAMES);
    let names: Vec<String> = names
        .iter()
        .take(SHOWN_NAMES)
        .map(|name| format!("`{}`", shown(name)))
        .collect();
    match (names.is_empty(), n_more) {
        (true, _) => "none".to_owned(),
        (false, 0) => names.join(", "),
        (false, _) => format!("{} and {n_more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tempfile::TempDir;

    use super::*;
    use crate::{DType, write_safetensors};

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/goldens")
            .join(name)
    }

    /// A folder with `config.json`, an index if given, and shards with U8 tensors of these names.
    fn folder(index: Option<&str>, shards: &[(&str, &[&str])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(
            folder.path().join("config.json"),
            r#"{"model_type": "deepseek_v3"}"#,
        )
        .unwrap();
        if let Some(index) = index {
            fs::write(folder.path().join(INDEX_NAME), index).unwrap();
        }
        for (file, names) in shards {
            let tensor =
                |name: &&str| Tensor::new(name, DType::U8, &[2], Bytes::from_static(&[1, 2]));
            let tensors: Vec<_> = names.iter().map(|name| tensor(name).unwrap()).collect();
            write_safetensors(&folder.path().join(file), &tensors, &BTreeMap::new()).unwrap();
        }
        folder
    }

    fn refuse(folder: &TempDir, expected: &str) {
        let error = Folder::open(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains(expected),
            "expected {expected:?} in {error:?}"
        );
    }

    #[test]
    fn published_folders_open_with_every_tensor() {
        for (name, n_shards, n_tensors) in [
            ("deepseek_v2_lite", 1, 83),
            ("deepseek_v2_group", 2, 137),
            ("deepseek_v3", 3, 171),
            ("deepseek_v3_fp8", 2, 81),
            ("deepseek_v3_fp8_ue8m0", 1, 81),
            ("qwen2_distill", 1, 39),
        ] {
            let folder = Folder::open(&golden(name)).unwrap();
            assert!(folder.config()["hidden_size"].is_u64(), "{name}");
            assert!(folder.generation_config().is_some(), "{name}");
            assert_eq!(folder.shards().len(), n_shards, "{name}");
            assert_eq!(folder.names().len(), n_tensors, "{name}");
            assert!(folder.names().is_sorted(), "{name}");
            assert!(folder.unindexed().is_empty(), "{name}");
            let sum: usize = folder
                .names()
                .map(|n| folder.tensor(n).unwrap().bytes.len())
                .sum();
            assert_eq!(folder.tensor_bytes(), sum as u64, "{name}");
        }
    }

    #[test]
    fn fp8_weights_and_their_scales_keep_dtype_and_shape() {
        let folder = Folder::open(&golden("deepseek_v3_fp8")).unwrap();
        let quantized = |name: &&str| folder.tensor(name).unwrap().dtype == DType::F8E4M3;
        let weights: Vec<&str> = folder.names().filter(quantized).collect();
        assert!(!weights.is_empty());
        for name in weights {
            let weight = folder.tensor(name).unwrap();
            let scale = folder.tensor(&format!("{name}_scale_inv")).unwrap();
            assert_eq!(scale.dtype, DType::F32);
            let blocks: Vec<_> = weight.shape.iter().map(|n| n.div_ceil(128)).collect();
            scale.expect_shape(&blocks).unwrap();
        }
    }

    #[test]
    fn the_index_is_followed_and_unindexed_tensors_are_set_apart() {
        let index =
            r#"{"metadata": {}, "weight_map": {"b": "y.safetensors", "a": "x.safetensors"}}"#;
        let shards: [(&str, &[&str]); 2] = [
            ("x.safetensors", &["a", "extra"]),
            ("y.safetensors", &["b"]),
        ];
        let model = folder(Some(index), &shards);
        let model = Folder::open(model.path()).unwrap();
        assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(
            model.shards(),
            [("x.safetensors", vec!["a"]), ("y.safetensors", vec!["b"])]
        );
        assert_eq!(&*model.unindexed()[0].name, "extra");
        assert_eq!(model.tensor_bytes(), 4);
        let error = model.tensor("extra").unwrap_err().to_string();
        assert!(error.ends_with("no tensor `extra`"), "{error}");
    }

    #[test]
    fn a_name_inside_a_wrapper_is_told() {
        let wanted = "model.layers.0.self_attn.q_proj.weight";
        for (found, is_told) in [
            (
                "language_model.model.layers.0.self_attn.q_proj.weight",
                true,
            ),
            (
                "model.language_model.layers.0.self_attn.q_proj.weight",
                true,
            ),
            ("_orig_mod.model.layers.0.self_attn.q_proj.weight", true),
            (
                "module._orig_mod.model.layers.0.self_attn.q_proj.weight",
                true,
            ),
            ("layers.0.self_attn.q_proj.weight", true),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
                true,
            ),
            ("model.layers.1.self_attn.q_proj.weight", false),
            ("model.layers.0.self_attn.q_proj.qweight", false),
        ] {
            let model = folder(None, &[("model.safetensors", &[found])]);
            let model = Folder::open(model.path()).unwrap();
            let error = model.tensor(wanted).unwrap_err().to_string();
            assert!(error.contains(&format!("no tensor `{wanted}`")), "{error}");
            let told = error.contains(&format!("found `{found}`, its name inside a wrapper"));
            assert_eq!(told, is_told, "{error}");
        }
    }

    #[test]
    fn an_index_that_disagrees_with_the_files_is_refused() {
        let index = |file: &str| format!(r#"{{"weight_map": {{"a": "{file}"}}}}"#);
        let shards: [(&str, &[&str]); 1] = [("x.safetensors", &["b"])];
        let check = |text: &str, expected: &str| refuse(&folder(Some(text), &shards), expected);
        check(
            &index("gone.safetensors"),
            "gone.safetensors`, and there is no such file",
        );
        check(
            &index("x.safetensors"),
            "x.safetensors`, which has no such tensor",
        );
        check(
            &index("../x.safetensors"),
            "expected a plain file name, found `../x.safetensors`",
        );
        check(
            &index("/etc/passwd"),
            "expected a plain file name, found `/etc/passwd`",
        );
        check(&index(".."), "expected a plain file name, found `..`");
        check(&index("a\\\\b"), "expected a plain file name");
        check(&index(""), "expected a plain file name");
        check("[1]", "expected a JSON object, found `[1]`");
        check("{}", "missing field `weight_map`");
        check(
            r#"{"weight_map": {"a": 1}}"#,
            "key `a`: invalid type: integer `1`",
        );
        check(
            r#"{"weight_map": {"a": "x", "a": "y"}}"#,
            "key `a` appears twice",
        );
        check(r#"{"weight_map": "#, "EOF while parsing");
        check("", "expected a JSON object, found ``");
    }

    #[test]
    fn a_tensor_in_two_shards_is_refused() {
        let index = r#"{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#;
        let shards: [(&str, &[&str]); 2] =
            [("x.safetensors", &["a"]), ("y.safetensors", &["a", "b"])];
        refuse(
            &folder(Some(index), &shards),
            "tensor `a`: expected in one file, found in",
        );
    }

    #[test]
    fn a_truncated_shard_is_refused_with_both_lengths() {
        let model = folder(None, &[("model.safetensors", &["a"])]);
        let path = model.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let expected = format!(
            "expected {} bytes as its header says, found {}",
            bytes.len(),
            bytes.len() - 1
        );
        refuse(&model, &expected);
    }

    #[test]
    fn without_an_index_one_weight_file_is_found_or_what_is_there_is_said() {
        let one = folder(
            None,
            &[
                ("weights.safetensors", &["a"]),
                ("adapter_model.safetensors", &["b"]),
            ],
        );
        assert!(Folder::open(one.path()).unwrap().contains("a"));
        let both = folder(
            None,
            &[("model.safetensors", &["a"]), ("other.safetensors", &["b"])],
        );
        assert!(Folder::open(both.path()).unwrap().contains("a"));

        let two = folder(
            None,
            &[("x.safetensors", &["a"]), ("y.safetensors", &["b"])],
        );
        refuse(
            &two,
            "several `.safetensors` files, found only `x.safetensors`, `y.safetensors`",
        );
        let none = folder(None, &[]);
        refuse(&none, "file, found none");
        fs::write(none.path().join("pytorch_model.bin"), b"").unwrap();
        fs::write(none.path().join("m.gguf"), b"").unwrap();
        refuse(&none, "file, found `m.gguf`, `pytorch_model.bin`");
    }

    #[test]
    fn configurations_must_be_there_be_objects_and_be_short() {
        let model = folder(None, &[("model.safetensors", &["a"])]);
        let config = model.path().join("config.json");
        for (text, expected) in [
            ("3", "expected a JSON object, found `3`"),
            ("{\"a\": }", "expected value at line 1 column 7"),
            ("\u{feff}{}", "expected a JSON object"),
        ] {
            fs::write(&config, text).unwrap();
            refuse(&model, expected);
        }
        fs::File::create(&config)
            .unwrap()
            .set_len(CONFIG_LIMIT + 1)
            .unwrap();
        refuse(&model, "expected at most 16777216 bytes, found 16777217");
        fs::remove_file(&config).unwrap();
        refuse(&model, "config.json`: No such file");
        fs::create_dir(&config).unwrap();
        refuse(&model, "expected a file, found a folder");
        refuse(&TempDir::new().unwrap(), "cannot read `");
    }
}
