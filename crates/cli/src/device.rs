//! The device that computes, among those that this build has.
//!
//! Verbs get their device here and hand it down: no other file of the program names one.

use std::ffi::OsString;
use std::path::PathBuf;

use burn::tensor::Device;
use kernels::device::{Widths, describe, is_gpu, self_test};
use model::ModelConfig;
use model::config::AttentionConfig;

use crate::console::{Console, MISMATCH, WithCode, end_at_panics, misuse};
use crate::host::cache;

/// The environment variable that names the device of verbs without `--device`.
pub(crate) const VARIABLE: &str = "MOEFORGE_DEVICE";

/// The device of verbs that read and write files.
pub(crate) fn cpu() -> Device {
    Device::flex()
}

// Where a verb computes. Not a doc comment: clap would show that as the help of the verb.
#[derive(Debug, Default, Clone, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Device to compute on: `cpu`, or an API that this build has: `gpu` (the best of them), `webgpu`, `metal`, `vulkan`,
    /// `cuda`. `webgpu:1` is the second adapter, and `webgpu:cpu` the software adapter. Default: MOEFORGE_DEVICE, or
    /// else `cpu`.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

impl DeviceArgs {
    /// Its name, for programs that this one starts.
    pub(crate) fn name(&self) -> Option<String> {
        let variable = || std::env::var(VARIABLE).ok().filter(|name| !name.is_empty());
        self.device.clone().or_else(variable)
    }

    /// The option on the command line.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let typed = self.device.iter();
        typed
            .flat_map(|name| ["--device".into(), name.into()])
            .collect()
    }

    /// Opens the device.
    ///
    /// # Errors
    /// With the code of wrong usage, if this build or this machine has no such device.
    pub(crate) fn open(&self) -> anyhow::Result<Device> {
        let name = self.name();
        let source = if self.device.is_some() {
            "--device"
        } else {
            VARIABLE
        };
        let name = name.as_deref().unwrap_or(kernels::device::CPU);
        let device = kernels::device::open(name);
        let device = device.map_err(|why| misuse(format!("{source}: {why}")))?;
        if is_gpu(&device) {
            // Its driver fails on a thread of its own, after which tensors hold anything, and who waits for them may wait
            // forever.
            let cure = "; use `--device cpu`, or another driver";
            end_at_panics(format!("device `{name}`"), cure, 1);
        }
        Ok(device)
    }
}

/// Says that a verb computes on the CPU alone, where [`VARIABLE`] names another device.
pub(crate) fn note_cpu_alone(verb: &str, console: &Console) {
    let named = DeviceArgs::default().name();
    if named.is_some_and(|name| name != kernels::device::CPU) {
        console.note(format_args!(
            "{VARIABLE}: `{verb}` computes on the CPU alone"
        ));
    }
}

/// What computes, for a run's directory: name, adapter and compiler, a line each.
pub(crate) fn record(device: &Device, name: Option<&str>) -> String {
    let name = name.unwrap_or(kernels::device::CPU);
    match describe(device) {
        Some(of) => format!(
            "device: {name}\nadapter: {}\ncompiler: {}\n",
            of.adapter, of.compiler
        ),
        None => format!("device: {}\n", kernels::device::CPU),
    }
}

/// Compares what a GPU computes at a model's widths with the CPU, unless it has passed before: as the same adapter, with
/// the same driver, compiler and version of this program.
///
/// # Errors
/// With the code of a difference, if it computes something else.
pub(crate) fn expect_right(
    device: &Device,
    config: &ModelConfig,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(description) = describe(device) else {
        return Ok(());
    };
    let widths = widths(config);
    let passed = passed_file(&format!("{description:?} {widths:?}"));
    let spoiled = spoiled();
    if spoiled.is_none() && passed.as_ref().is_some_and(|file| file.exists()) {
        return Ok(());
    }
    console.detail(format_args!(
        "{}: comparing with the CPU at this model's widths",
        description.adapter
    ));
    self_test(device, widths, spoiled.as_deref()).map_err(|difference| {
        let message = format!(
            "{} computes something else than the CPU: {difference}; nothing it computes can be trusted; use `--device \
             cpu`, or another driver",
            description.adapter
        );
        anyhow::Error::new(WithCode { code: MISMATCH, message })
    })?;
    if let Some(file) = passed {
        // Without the file, the comparison is only made again.
        let _ = file.parent().map(std::fs::create_dir_all);
        let _ = std::fs::write(&file, format!("{description:#?}\n{widths:#?}\n"));
    }
    Ok(())
}

/// An operation whose results the comparison changes: for a test of what happens then, in builds for tests alone.
fn spoiled() -> Option<String> {
    cfg!(debug_assertions)
        .then(|| std::env::var("MOEFORGE_TEST_SPOIL").ok())
        .flatten()
}

/// The file that says that a device has passed.
fn passed_file(of: &str) -> Option<PathBuf> {
    let key = checkpoint::fnv1a(0, format!("{of} {}", env!("CARGO_PKG_VERSION")).bytes());
    Some(cache()?.join(format!("devices/{key:016x}")))
}

fn widths(config: &ModelConfig) -> Widths {
    let moe = config.moe.as_ref();
    Widths {
        hidden: config.hidden_size,
        inner: moe.map_or(config.intermediate_size, |moe| moe.moe_intermediate_size),
        vocab: config.vocab_size,
        experts: moe.map_or(0, |moe| moe.n_routed_experts),
        head: match &config.attention {
            AttentionConfig::Mla(mla) => mla.qk_head_dim(),
            AttentionConfig::Gqa(gqa) => gqa.head_dim,
        },
    }
}
