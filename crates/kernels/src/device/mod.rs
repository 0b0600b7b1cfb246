//! The devices of this build: their names, and opening one.
//!
//! A name is an API and, if there are several adapters, which one: `cpu`, `gpu` (the best API of the build), `webgpu`,
//! `metal`, `vulkan`, `cuda`; `webgpu:1` is the second adapter, discrete ones counted first, and `webgpu:cpu` the
//! software adapter. One program compiles shaders for wgpu in one way: `webgpu` to WGSL, on whatever API the system has.

mod reads;
mod self_test;

use std::sync::{Mutex, PoisonError};

use burn::tensor::Device;

use crate::error::Error;
use crate::formats::Matrix;

pub use self::reads::{read, read_ints, reads};
pub use self::self_test::{OperationDifference, Widths, self_test};
pub use crate::backend::is_gpu;

/// The name of the device that every build has.
pub const CPU: &str = "cpu";

/// Which adapter of an API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AdapterName {
    /// The one that the API prefers.
    Default,
    /// By number: discrete ones, then integrated, then virtual.
    Number(usize),
    /// The software adapter.
    Software,
}

/// Names of the APIs that are compiled in, best first.
pub fn apis() -> Vec<&'static str> {
    [
        (cfg!(feature = "metal"), "metal"),
        (cfg!(feature = "cuda"), "cuda"),
        (cfg!(feature = "vulkan"), "vulkan"),
        (cfg!(feature = "webgpu"), "webgpu"),
    ]
    .into_iter()
    .filter_map(|(is_built, name)| is_built.then_some(name))
    .collect()
}

/// Opens a device by its name. The same name gives the same device.
///
/// # Errors
/// In a sentence: if there is no such name, the API is not compiled in, or there is no such adapter.
pub fn open(name: &str) -> Result<Device, String> {
    static OPENED: Mutex<Vec<(String, Device)>> = Mutex::new(Vec::new());
    let (api, adapter) = parse(name)?;
    if api == CPU {
        return Ok(Device::flex());
    }
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = format!("{api} {adapter:?}");
    if let Some((_, device)) = opened.iter().find(|known| known.0 == key) {
        return Ok(device.clone());
    }
    let device = open_api(api, adapter).map_err(|why| format!("`{name}`: {why}"))?;
    opened.push((key, device.clone()));
    Ok(device)
}

/// Names of the adapters that this machine has for the APIs of this build. Opens each.
pub fn names() -> Vec<String> {
    let mut names = Vec::new();
    for api in apis() {
        let numbered = (0..).map(|number| format!("{api}:{number}"));
        names.extend(numbered.take_while(|name| open(name).is_ok()));
        let software = format!("{api}:{CPU}");
        names.extend(open(&software).is_ok().then_some(software));
    }
    names
}

/// What an adapter is and can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its own name.
    pub adapter: String,
    /// What kernels are compiled for: the compiler, and what it depends on.
    pub compiler: String,
    /// Bytes that may be in use at once, if the API says.
    pub memory_bytes: Option<u64>,
    /// Bytes of one binding, and so of one tensor.
    pub max_binding_bytes: u64,
    /// Bytes of shared memory of a workgroup.
    pub shared_memory_bytes: usize,
    /// Buffers of a kernel.
    pub bindings: u32,
    /// Whether there is arithmetic in f16.
    pub f16: bool,
    /// Whether there is arithmetic in bf16.
    pub bf16: bool,
    /// Whether threads of a subgroup can exchange values.
    pub subgroups: bool,
    /// Whether there are units for products of small matrices.
    pub matrix_units: bool,
}

/// Speeds of an adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Reading memory.
    pub read_bytes_per_second: Option<f64>,
    /// Products and sums in f32, without matrix units.
    pub f32_flops: Option<f64>,
    /// From one launch to the next.
    pub launch_seconds: Option<f64>,
}

/// What an adapter is; none of the CPU.
pub fn describe(device: &Device) -> Option<Description> {
    #[cfg(feature = "gpu")]
    return gpu::describe(device);
    #[cfg(not(feature = "gpu"))]
    return {
        let _ = device;
        None
    };
}

/// Bytes of an adapter's memory that are reserved: by tensors, and for tensors to come; none of the CPU.
pub fn reserved_bytes(device: &Device) -> Option<u64> {
    let usage = device.memory_pool_usage();
    usage.map(|usage| usage.bytes_reserved)
}

/// Measures an adapter, for some seconds; none of the CPU.
pub fn measure(device: &Device) -> Option<Measured> {
    #[cfg(feature = "gpu")]
    return gpu::measure(device);
    #[cfg(not(feature = "gpu"))]
    return {
        let _ = device;
        None
    };
}

#[cfg(feature = "gpu")]
mod gpu {
    use burn::cubecl::client::Client;
    use burn::cubecl::future::block_on;
    use burn::cubecl::ir::{ElemType, FloatKind};
    use burn::tensor::{DType, Device, MemoryAccess, ThroughputKey, ThroughputMode};

    use super::{Description, Measured};
    use crate::backend::cube::checksum;
    use crate::error::Error;
    use crate::formats::Matrix;
    use crate::formats::placed::cube_device;

    pub(super) fn describe(device: &Device) -> Option<Description> {
        let client = cube_device(device)?.client();
        let (properties, identity) = (client.properties(), device.identity()?);
        let hardware = &properties.hardware;
        Some(Description {
            adapter: identity.name,
            compiler: identity.fingerprint,
            memory_bytes: properties.memory.max_memory(),
            max_binding_bytes: properties.memory.max_page_size,
            shared_memory_bytes: hardware.max_shared_memory_size,
            bindings: hardware.max_bindings,
            f16: device.supports_dtype(DType::F16),
            bf16: device.supports_dtype(DType::BF16),
            subgroups: !properties.features.plane.is_empty(),
            matrix_units: !properties.features.matmul.cmma.is_empty(),
        })
    }

    /// Recordings that are tried: memory that the run before has left may come back too late for one.
    const RECORDINGS: usize = 8;

    pub(super) fn recorded<T>(device: &Device, run: impl Fn() -> T) -> Result<(), String> {
        let client = cube_device(device).ok_or("only a GPU records")?.client();
        let mut outcome = Ok(());
        for _ in 0..RECORDINGS {
            outcome = record_once(&client, &run);
            let lacks_memory = |why: &String| why.contains("No room for");
            if !outcome.as_ref().is_err_and(lacks_memory) {
                break;
            }
        }
        outcome
    }

    fn record_once<T>(client: &Client, run: &impl Fn() -> T) -> Result<(), String> {
        let text = |error| format!("{error:?}");
        client.graph_prepare().map_err(text)?;
        // The first run compiles, and leaves the memory that the second one needs.
        drop(run());
        block_on(client.sync()).map_err(text)?;
        client.start_capture().map_err(text)?;
        let kept = run();
        let recorded = client.stop_capture();
        drop(kept);
        recorded.map(drop).map_err(text)
    }

    pub(super) fn expect_unchanged(weights: &[Matrix]) -> Result<(), Error> {
        let mut stacks = Vec::new();
        for matrix in weights {
            let parts = matrix.split_kv_b().and_then(|split| split.parts());
            for part in parts.map_or(vec![matrix], Vec::from) {
                stacks.extend(part.placed().map(|placed| &*placed.stack));
            }
        }
        match checksum::changed(&stacks) {
            0 => Ok(()),
            changed => Err(Error::Placement(format!(
                "the device has changed {changed} pieces of the weights since they were copied there; \
                 try another driver, or the CPU"
            ))),
        }
    }

    pub(super) fn measure(device: &Device) -> Option<Measured> {
        cube_device(device)?;
        let keys = [
            ThroughputMode::memory(MemoryAccess::Read),
            ThroughputMode::ComputeDirect {
                dtype: ElemType::Float(FloatKind::F32),
            },
            ThroughputMode::Launch,
        ];
        let keys = keys.map(|mode| ThroughputKey { mode });
        let stats = device.performance_stats(&keys);
        let speed = |i: usize| {
            let measured = stats.get(i)?.value.ok()?;
            Some(measured.ops_per_s()).filter(|speed| speed.is_finite() && *speed > 0.0)
        };
        Some(Measured {
            read_bytes_per_second: speed(0),
            f32_flops: speed(1),
            launch_seconds: speed(2).map(|launches| 1.0 / launches),
        })
    }
}

/// Runs work whose launches a GPU records instead of executing. It fails if anything is uploaded, which would stop all
/// launches for a moment, or if memory is needed that an earlier run did not leave; reading in it panics.
///
/// # Errors
/// What the device refused.
pub fn recorded<T>(device: &Device, run: impl Fn() -> T) -> Result<(), String> {
    #[cfg(feature = "gpu")]
    return gpu::recorded(device, run);
    #[cfg(not(feature = "gpu"))]
    return {
        let _ = (device, run);
        Err("only a GPU records".to_owned())
    };
}

/// Compares weights on a GPU with what was copied there, by checksums. On a CPU there is nothing to compare.
///
/// # Errors
/// If some have changed: how many pieces.
pub fn expect_unchanged(weights: &[Matrix]) -> Result<(), Error> {
    #[cfg(feature = "gpu")]
    return gpu::expect_unchanged(weights);
    #[cfg(not(feature = "gpu"))]
    return {
        let _ = weights;
        Ok(())
    };
}

/// Limits the bytes of each plane of a shard, for all matrices that are copied to a GPU from now on; a GPU has a limit of
/// its own. For tests of what is cut.
pub fn limit_shard_bytes(bytes: usize) {
    #[cfg(feature = "gpu")]
    crate::formats::limit_shard_bytes(bytes);
    #[cfg(not(feature = "gpu"))]
    let _ = bytes;
}

/// The device of tests: the one that `MOEFORGE_TEST_DEVICE` names, or else the CPU.
///
/// # Panics
/// If there is none of that name.
pub fn of_tests() -> Device {
    let name = std::env::var("MOEFORGE_TEST_DEVICE").unwrap_or_else(|_| CPU.to_owned());
    open(&name).unwrap_or_else(|why| panic!("MOEFORGE_TEST_DEVICE: {why}"))
}

/// The API and the adapter of a name.
fn parse(name: &str) -> Result<(&'static str, AdapterName), String> {
    let (api, adapter) = match name.split_once(':') {
        None => (name, AdapterName::Default),
        Some((api, CPU)) => (api, AdapterName::Software),
        Some((api, number)) => {
            let number = number.parse().map_err(|_| {
                format!("expected a number or `cpu` after the colon, found `{name}`")
            })?;
            (api, AdapterName::Number(number))
        }
    };
    let built = apis();
    let known = match api {
        CPU if adapter == AdapterName::Default => Some(CPU),
        "gpu" => built.first().copied(),
        _ => built.iter().copied().find(|known| *known == api),
    };
    known.map(|known| (known, adapter)).ok_or_else(|| {
        let names: Vec<&str> = [CPU].into_iter().chain(built).collect();
        let cure = match api {
            "gpu" | "webgpu" | "metal" | "vulkan" | "cuda" => {
                let feature = if api == "gpu" { "webgpu" } else { api };
                format!("; build with `--features {feature}` for it")
            }
            _ => String::new(),
        };
        format!(
            "expected one of {}, which this build has, found `{name}`{cure}",
            names.join(", ")
        )
    })
}

#[cfg(not(feature = "gpu"))]
fn open_api(_: &str, _: AdapterName) -> Result<Device, String> {
    Err("this build has no GPU".to_owned())
}

#[cfg(feature = "gpu")]
fn open_api(api: &str, adapter: AdapterName) -> Result<Device, String> {
    #[cfg(feature = "cuda")]
    if api == "cuda" {
        return open_cuda(adapter);
    }
    open_wgpu(api, adapter)
}

#[cfg(feature = "cuda")]
fn open_cuda(adapter: AdapterName) -> Result<Device, String> {
    match adapter {
        AdapterName::Default => Ok(Device::cuda(0)),
        AdapterName::Number(number) => Ok(Device::cuda(number)),
        AdapterName::Software => Err("there is no software adapter for CUDA".to_owned()),
    }
}

#[cfg(all(
    feature = "gpu",
    not(any(feature = "webgpu", feature = "metal", feature = "vulkan"))
))]
fn open_wgpu(api: &str, _: AdapterName) -> Result<Device, String> {
    Err(format!("this build has no {api}"))
}

#[cfg(any(feature = "webgpu", feature = "metal", feature = "vulkan"))]
fn open_wgpu(api: &str, adapter: AdapterName) -> Result<Device, String> {
    use burn::tensor::DeviceKind;
    use burn::tensor::wgpu::WgpuBackend;

    // The API called WebGpu is a browser's. Outside of one, WGSL runs on what the system has.
    let backend = match api {
        "metal" => WgpuBackend::Metal,
        "vulkan" => WgpuBackend::Vulkan,
        _ => WgpuBackend::Auto,
    };
    let init = |kind: DeviceKind| {
        let options = Device::wgpu_options().device_kind(kind);
        options.graphics_api(backend).init()
    };
    let absent = |error: &dyn std::fmt::Display| format!("no such adapter was found ({error})");
    match adapter {
        AdapterName::Default => init(DeviceKind::DefaultDevice).map_err(|e| absent(&e)),
        AdapterName::Software => init(DeviceKind::Cpu).map_err(|e| absent(&e)),
        AdapterName::Number(number) => {
            let kinds: [fn(usize) -> DeviceKind; 3] = [
                DeviceKind::DiscreteGpu,
                DeviceKind::IntegratedGpu,
                DeviceKind::VirtualGpu,
            ];
            let mut before = 0;
            for kind in kinds {
                for i in 0.. {
                    match init(kind(i)) {
                        Ok(device) if before == number => return Ok(device),
                        Ok(_) => before += 1,
                        Err(_) => break,
                    }
                }
            }
            Err(format!(
                "{before} hardware adapters were found, counted from 0"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_or_refused_with_what_there_is() {
        assert_eq!(parse("cpu"), Ok((CPU, AdapterName::Default)));
        for unknown in ["", "tpu", "cpu:0", "webgpu:x", "cuda:-1"] {
            let error = open(unknown).unwrap_err();
            assert!(error.contains("expected"), "{unknown}: {error}");
        }
        if apis().is_empty() {
            let error = open("metal").unwrap_err();
            assert!(error.contains("--features metal"), "{error}");
        }
    }
}
