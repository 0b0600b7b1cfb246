//! `moeforge devices`: what can compute here.

use std::process::ExitCode;

use kernels::device::{self, Description};
use serde_json::{Value, json};

use crate::console::Console;
use crate::host;

/// List the devices that this build can compute on, with their limits.
///
/// Of each adapter it says what the hardware or its driver does itself; the rest is computed in f32 or by integer
/// arithmetic. With --measure, it is opened and timed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also measure memory bandwidth, f32 FLOP/s and the time to launch a kernel.
    #[arg(long)]
    measure: bool,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let mut devices = vec![cpu()];
    for name in device::names() {
        let opened = device::open(&name).map_err(|why| anyhow::anyhow!("{why}"))?;
        let Some(description) = device::describe(&opened) else {
            continue;
        };
        let measured = args.measure.then(|| device::measure(&opened)).flatten();
        devices.push(of_gpu(&name, &description, measured));
    }
    if args.json {
        console.result(format_args!("{:#}", json!({ "devices": devices })));
        return Ok(ExitCode::SUCCESS);
    }
    let text: Vec<String> = devices.iter().map(to_text).collect();
    console.result(text.join("\n"));
    if device::apis().is_empty() {
        console.note(
            "this build has no GPU; `--features webgpu`, `metal`, `vulkan` or `cuda` adds one",
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The processor.
fn cpu() -> Value {
    let host = host::read();
    json!({
        "name": device::CPU,
        "adapter": std::env::consts::ARCH,
        "threads": rayon::current_num_threads(),
        "memory_bytes": host.available_bytes,
        "memory_from": "memory that is free now",
    })
}

/// An adapter.
fn of_gpu(name: &str, of: &Description, measured: Option<device::Measured>) -> Value {
    let mut value = json!({
        "name": name,
        "adapter": of.adapter,
        "compiler": of.compiler,
        "memory_bytes": of.memory_bytes,
        "memory_from": of.memory_bytes.map_or("the API gives no figure", |_| "what the API says may be used at once"),
        "max_binding_bytes": of.max_binding_bytes,
        "shared_memory_bytes": of.shared_memory_bytes,
        "bindings": of.bindings,
        "native": {
            "f16": of.f16,
            "bf16": of.bf16,
            "fp8": false,
            "subgroups": of.subgroups,
            "matrix_units": of.matrix_units,
        },
    });
    if let Some(measured) = measured {
        value["measured"] = json!({
            "read_bytes_per_second": measured.read_bytes_per_second,
            "f32_flops": measured.f32_flops,
            "launch_seconds": measured.launch_seconds,
        });
    }
    value
}

/// Some lines for people.
fn to_text(device: &Value) -> String {
    let text = |key: &str| device[key].as_str().unwrap_or_default();
    let mut lines = vec![
        format!("{}: {}", text("name"), text("adapter")),
        format!(
            "  memory: {} ({})",
            size(&device["memory_bytes"]),
            text("memory_from")
        ),
    ];
    if let Some(threads) = device["threads"].as_u64() {
        lines.push(format!("  threads: {threads}"));
    }
    if device["native"].is_object() {
        let shared = device["shared_memory_bytes"].as_u64().unwrap_or_default() >> 10;
        let binding = size(&device["max_binding_bytes"]);
        lines.push(format!(
            "  one binding: {binding}; {} bindings",
            device["bindings"]
        ));
        lines.push(format!("  shared memory: {shared} KiB"));
        lines.push(natives(&device["native"]));
        lines.push(format!("  compiler: {}", text("compiler")));
    }
    if device["measured"].is_object() {
        lines.push(speeds(&device["measured"]));
    }
    lines.join("\n")
}

fn size(bytes: &Value) -> String {
    let gib = |bytes: f64| format!("{:.2} GiB", bytes / f64::from(1 << 30));
    bytes.as_f64().map_or_else(|| "unknown".to_owned(), gib)
}

/// What an adapter has, and what it lacks.
fn natives(native: &Value) -> String {
    let all = native.as_object().into_iter().flatten();
    let (has, lacks): (Vec<_>, Vec<_>) = all.partition(|(_, is)| is.as_bool() == Some(true));
    let names = |of: Vec<(&String, &Value)>| {
        let names: Vec<String> = of.iter().map(|(name, _)| name.replace('_', " ")).collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    format!(
        "  native: {}; simulated or missing: {}",
        names(has),
        names(lacks)
    )
}

fn speeds(measured: &Value) -> String {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "not measured".to_owned());
    let giga = |key: &str, unit: &str| {
        or_none(
            measured[key]
                .as_f64()
                .map(|speed| format!("{:.1} G{unit}", speed / 1e9)),
        )
    };
    let launch = measured["launch_seconds"].as_f64();
    format!(
        "  measured: {} read, {} in f32, {} per launch",
        giga("read_bytes_per_second", "B/s"),
        giga("f32_flops", "FLOP/s"),
        or_none(launch.map(|seconds| format!("{:.1} µs", seconds * 1e6))),
    )
}
