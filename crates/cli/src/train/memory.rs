//! The machine's memory and this program's, as Linux counts them; nothing is known elsewhere.

use train::Memory;

/// What there is now.
pub(crate) fn read() -> Memory {
    Memory {
        available_bytes: bytes("/proc/meminfo", "MemAvailable:"),
        peak_bytes: bytes("/proc/self/status", "VmHWM:"),
    }
}

/// Makes what is held now the most that was held, where Linux lets a program do so; see proc(5), `clear_refs`.
pub(crate) fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The bytes on the line of a file that starts with a name.
fn bytes(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}
