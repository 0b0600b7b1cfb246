//! The host: memory of the machine and of this program, as reported by the operating system.

pub(crate) mod energy;
#[cfg(all(feature = "mpi", debug_assertions))]
mod faults;
pub(crate) mod launch;
pub(crate) mod machine;
pub(crate) mod resident;
pub(crate) mod scratch;

use std::path::PathBuf;

use train::Memory;

use self::machine::Machine;

/// The memory now.
pub(crate) fn read() -> Memory {
    Memory {
        available_bytes: Machine::here().free().map(|limit| limit.bytes),
        peak_bytes: bytes("/proc/self/status", "VmHWM:"),
        ..Memory::default()
    }
}

/// Resets the peak memory to the current memory, on Linux; see proc(5), `clear_refs`.
pub(crate) fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The bytes on the line of a file that begins with a name.
fn bytes(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// The folder of what can be made again: in `XDG_CACHE_HOME`, or in `.cache` at home.
pub(crate) fn cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let default = || Some(PathBuf::from(set("HOME")?).join(".cache"));
    let folder = set("XDG_CACHE_HOME").map(PathBuf::from).or_else(default)?;
    Some(folder.join("moeforge"))
}
