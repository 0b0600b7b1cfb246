//! A LoRA adapter as PEFT or mlx-lm stores it: a folder with a configuration and one safetensors file.
//!
//! Keys and shapes are those of the file; the caller, who knows the model, tells the two dialects for experts apart.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::shown;
use crate::file::{is_present, sha256};
use crate::json::{CONFIG_LIMIT, parse, read_object};
use crate::mlx_adapter;
use crate::{AdapterConfig, Error, FolderWriter, Result, Safetensors, Tensor, TensorSpec};

const CONFIG_NAME: &str = "adapter_config.json";
const WEIGHTS_NAME: &str = "adapter_model.safetensors";
const MLX_WEIGHTS_NAME: &str = "adapters.safetensors";
const NOTES_NAME: &str = "moeforge.json";
const PICKLED_NAME: &str = "adapter_model.bin";

/// An opened adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// The convention of its tensors' names and shapes.
    pub format: AdapterFormat,
    /// Notes without a setting in PEFT.
    pub notes: Notes,
    file: Safetensors,
}

/// The program with the convention of an adapter's names and shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterFormat {
    /// PEFT's.
    Peft,
    /// mlx-lm's.
    Mlx,
}

/// Properties of an adapter without a setting in PEFT, in a separate file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Notes {
    /// The name of the format that it was trained to be merged into.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_for: Option<String>,
    /// The factors that the experts of a layer share: `A`, `B` or `outer`. The file repeats them for every expert, because PEFT
    /// expects that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_share: Option<String>,
    /// What PEFT does not read, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unread_by_peft: Option<String>,
}

impl Adapter {
    /// Opens an adapter's folder.
    ///
    /// # Errors
    /// If a file is absent or malformed, or a setting is unsupported.
    pub fn open(folder: &Path) -> Result<Self> {
        let weights = folder.join(WEIGHTS_NAME);
        let has_weights = is_present(&weights)?;
        if !has_weights && is_present(&folder.join(MLX_WEIGHTS_NAME))? {
            return Ok(Self {
                config: mlx_adapter::read_config(&folder.join(CONFIG_NAME))?,
                format: AdapterFormat::Mlx,
                notes: Notes::default(),
                file: Safetensors::open(&folder.join(MLX_WEIGHTS_NAME))?,
            });
        }
        let config = AdapterConfig::open(&folder.join(CONFIG_NAME))?;
        if !has_weights && is_present(&folder.join(PICKLED_NAME))? {
            return Err(Error::AdapterPickled {
                folder: folder.to_owned(),
            });
        }
        let file = Safetensors::open(&weights)?;
        let notes = folder.join(NOTES_NAME);
        let notes = if is_present(&notes)? {
            let text = read_object(&notes, CONFIG_LIMIT)?;
            let Notes {
                trained_for,
                experts_share,
                unread_by_peft,
            } = parse(&notes, &text)?;
            Notes {
                trained_for: trained_for.as_deref().map(shown),
                experts_share: experts_share.as_deref().map(shown),
                unread_by_peft: unread_by_peft.as_deref().map(shown),
            }
        } else {
            Notes::default()
        };
        Ok(Self {
            config,
            format: AdapterFormat::Peft,
            notes,
            file,
        })
    }

    /// The file with its tensors, for messages.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The tensors under their full keys (`base_model.model.….lora_A.weight` of PEFT), in the order
    /// of the file.
    pub fn tensors(&self) -> &[Tensor] {
        self.file.tensors()
    }

    /// Whether there is a tensor of that full key.
    pub fn contains(&self, key: &str) -> bool {
        self.file.contains(key)
    }

    /// The tensor of that full key.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&self, key: &str) -> Result<Tensor> {
        self.file.tensor(key)
    }

    /// The SHA-256 of the file of its tensors, in hexadecimal.
    ///
    /// # Errors
    /// If the file can no longer be read.
    pub fn sha256(&self) -> Result<String> {
        sha256(self.file.path())
    }

    /// Writes an adapter's folder whole or not at all.
    ///
    /// # Errors
    /// If `folder` exists and is not empty, a setting is unsupported, or writing fails.
    pub fn save(folder: &Path, config: &AdapterConfig, tensors: &[Tensor]) -> Result<()> {
        let mut writer = FolderWriter::create(folder)?;
        Self::save_into(&mut writer, config, tensors)?;
        writer.finish()
    }

    /// The files of an adapter, and nothing else of its folder, which may be a checkpoint.
    pub fn files(folder: &Path) -> Vec<PathBuf> {
        let names = [CONFIG_NAME, WEIGHTS_NAME, MLX_WEIGHTS_NAME, NOTES_NAME];
        let paths = names.map(|name| folder.join(name)).into_iter();
        paths.filter(|path| path.exists()).collect()
    }

    /// Copies the files of an adapter.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn copy_into(folder: &Path, writer: &mut FolderWriter) -> Result<()> {
        for path in Self::files(folder) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            writer.copy_file(&path, &name)?;
        }
        Ok(())
    }

    /// Writes an adapter's notes, if there are any.
    ///
    /// # Errors
    /// If writing fails.
    pub fn save_notes(writer: &mut FolderWriter, notes: &Notes) -> Result<()> {
        if *notes == Notes::default() {
            return Ok(());
        }
        let notes = serde_json::to_value(notes).expect("a struct of strings is JSON");
        writer.write_json(NOTES_NAME, &notes)
    }

    /// Writes an adapter's two files into a folder with other files, such as a training checkpoint.
    ///
    /// # Errors
    /// If a setting is unsupported, or writing fails.
    pub fn save_into(
        writer: &mut FolderWriter,
        config: &AdapterConfig,
        tensors: &[Tensor],
    ) -> Result<()> {
        let value = config.to_json(&writer.path().join(CONFIG_NAME))?;
        writer.write_json(CONFIG_NAME, &value)?;
        let specs: Vec<TensorSpec> = tensors.iter().map(Tensor::spec).collect();
        writer.add_shard(WEIGHTS_NAME, &specs, |i| Ok(&tensors[i].bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::TargetModules;

    const GOLDENS: [(&str, usize, usize); 4] = [
        ("deepseek_v2_lite/adapter_classic", 138, 4),
        ("deepseek_v2_lite/adapter_peft", 32, 4),
        ("deepseek_v3/adapter_classic", 192, 2),
        ("deepseek_v3/adapter_peft", 38, 2),
    ];

    fn golden(name: &str) -> Adapter {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
        Adapter::open(&goldens.join(name)).unwrap()
    }

    #[test]
    fn adapters_of_both_dialects_open() {
        for (name, n_tensors, r) in GOLDENS {
            let adapter = golden(name);
            assert_eq!(adapter.tensors().len(), n_tensors, "{name}");
            assert_eq!(adapter.config.r, r, "{name}");
            assert_eq!(adapter.config.lora_alpha, 2.0 * r as f64, "{name}");
            let Some(TargetModules::List(modules)) = &adapter.config.target_modules else {
                panic!("{name}: expected a list of modules");
            };
            assert!(modules.contains(&"kv_b_proj".to_owned()), "{name}");
            let stacked = adapter.config.target_parameters.is_some();
            assert_eq!(stacked, name.ends_with("peft"), "{name}");
            let key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight";
            assert_eq!(adapter.tensor(key).unwrap().shape[0], r, "{name}");
        }
    }

    #[test]
    fn a_saved_adapter_opens_equal() {
        for (name, ..) in GOLDENS {
            let adapter = golden(name);
            let parent = tempfile::tempdir().unwrap();
            let folder = parent.path().join("adapter");
            Adapter::save(&folder, &adapter.config, adapter.tensors()).unwrap();
            let copy = Adapter::open(&folder).unwrap();
            assert_eq!(copy.config, adapter.config);
            assert_eq!(copy.file.metadata()["format"], "pt");
            assert_eq!(copy.tensors().len(), adapter.tensors().len());
            for tensor in adapter.tensors() {
                let found = copy.tensor(&tensor.name).unwrap();
                assert_eq!((found.spec(), &found.bytes), (tensor.spec(), &tensor.bytes));
            }
        }
    }

    #[test]
    fn incomplete_adapters_are_refused_with_a_cure() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |expected: &str| {
            let error = Adapter::open(folder.path()).unwrap_err().to_string();
            assert!(
                error.contains(expected),
                "expected {expected:?} in {error:?}"
            );
        };
        refuse("adapter_config.json`: No such file");
        let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1}"#;
        fs::write(folder.path().join(CONFIG_NAME), config).unwrap();
        refuse("adapter_model.safetensors`: No such file");
        fs::write(folder.path().join(PICKLED_NAME), b"").unwrap();
        refuse("found only `adapter_model.bin`; load it in PEFT and save it again");
    }

    #[test]
    fn an_unsupported_setting_is_not_saved_and_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let mut config = AdapterConfig::new(1, 1.0);
        config.bias = "all".into();
        let error = Adapter::save(&parent.path().join("x"), &config, &[]).unwrap_err();
        assert!(error.to_string().contains("unsupported `bias`"), "{error}");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
