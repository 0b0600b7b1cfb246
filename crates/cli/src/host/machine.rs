//! The memory of this machine, from the files and commands of its system, or from a folder that stands for them.

mod cgroups;
mod mac;

use std::path::{Path, PathBuf};

/// Where a machine says what it is.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// What the paths of files begin with. A folder other than `/` has the answers of commands as files too.
    root: PathBuf,
    is_mac: bool,
}

/// What bounds the memory of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryLimit {
    /// Bytes that it may have.
    pub(crate) bytes: u64,
    /// What says so.
    pub(crate) source: String,
}

/// What a Mac's GPU may hold, of the memory that it shares with the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GpuShare {
    /// Bytes it may hold.
    pub(crate) bytes: u64,
    /// Bytes of the machine.
    pub(crate) of_bytes: u64,
    /// Whether somebody has set it; else it is the system's default.
    pub(crate) is_set: bool,
}

/// The variable with a folder that stands for a machine, in builds that check themselves.
#[cfg(debug_assertions)]
const FOLDER: &str = "MOEFORGE_MACHINE";

impl Machine {
    /// This machine.
    pub(crate) fn here() -> Self {
        #[cfg(debug_assertions)]
        if let Some(folder) = std::env::var_os(FOLDER) {
            return Self::of_folder(Path::new(&folder));
        }
        Self {
            root: "/".into(),
            is_mac: cfg!(target_os = "macos"),
        }
    }

    /// The machine that a folder stands for: a Mac if it has an answer of `sysctl` or `vm_stat`.
    pub(crate) fn of_folder(root: &Path) -> Self {
        let is_mac = ["sysctl", "vm_stat"]
            .iter()
            .any(|name| root.join(name).exists());
        Self {
            root: root.into(),
            is_mac,
        }
    }

    /// The text of a file, by its path from the root.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path)).ok()
    }

    /// The path of a file or folder, given from the root.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Whether it is a Mac.
    pub(crate) fn is_mac(&self) -> bool {
        self.is_mac
    }

    /// Whether it is this one.
    pub(crate) fn is_here(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The memory that new allocations can get without swapping.
    pub(crate) fn free(&self) -> Option<MemoryLimit> {
        if self.is_mac {
            let bytes = mac::available(self)?;
            let source = "free memory".into();
            return Some(MemoryLimit { bytes, source });
        }
        let machine = MemoryLimit {
            bytes: self.memory("MemAvailable:")?,
            source: "free memory".into(),
        };
        let group = cgroups::tightest(self);
        Some(match group {
            Some(group) if group.bytes < machine.bytes => group,
            _ => machine,
        })
    }

    /// What a Mac's GPU may hold; none on other systems.
    pub(crate) fn gpu_share(&self) -> Option<GpuShare> {
        mac::gpu_share(self).filter(|_| self.is_mac)
    }

    fn memory(&self, name: &str) -> Option<u64> {
        let text = self.text("proc/meminfo")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        kib.checked_mul(1 << 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of files.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let machine = Machine::of_folder(dir.path());
        (dir, machine)
    }

    const MEMINFO: &str = "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n";

    #[test]
    fn a_container_has_what_its_group_leaves() {
        let (_dir, machine) = machine(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/docker/1f\n"),
            ("sys/fs/cgroup/docker/1f/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/docker/1f/memory.current", "1073741824\n"),
            (
                "sys/fs/cgroup/docker/1f/memory.stat",
                "active_file 536870912\n",
            ),
        ]);
        let limit = machine.free().unwrap();
        assert_eq!(limit.bytes, (3 << 30) + (1 << 29));
        assert_eq!(limit.source, "control group /docker/1f");
        assert_eq!(machine.gpu_share(), None);
    }

    #[test]
    fn a_group_without_a_limit_leaves_the_machine() {
        let (_dir, machine) = machine(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/user.slice\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "max\n"),
        ]);
        let limit = machine.free().unwrap();
        assert_eq!(
            (limit.bytes, limit.source.as_str()),
            (20_000_000 << 10, "free memory")
        );
    }

    #[test]
    fn macs_say_what_their_gpu_may_hold() {
        let vm_stat = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free: 1000000.\n\
                       Pages inactive: 500000.\nPages speculative: 24.\n";
        let sysctl = |bytes: u64, wired: u64| {
            format!("hw.memsize: {bytes}\niogpu.wired_limit_mb: {wired}\n")
        };
        for (gib, wired, expected, is_set) in [
            (512, 0, 384 << 30, false),
            (512, 458_752, 448 << 30, true),
            (16, 0, (16 << 30) / 3 * 2, false),
        ] {
            let text = sysctl(gib << 30, wired);
            let (_dir, machine) = machine(&[("vm_stat", vm_stat), ("sysctl", &text)]);
            let share = machine.gpu_share().unwrap();
            assert_eq!(
                (share.bytes, share.is_set),
                (expected, is_set),
                "{gib} {wired}"
            );
            assert_eq!(machine.free().unwrap().bytes, 16384 * 1_500_024);
        }
    }

    #[test]
    fn a_machine_that_says_nothing_has_no_limit() {
        let (_dir, machine) = machine(&[]);
        assert_eq!(machine.free(), None);
        let (_dir, mac) = self::machine(&[("sysctl", "hw.memsize: many\n")]);
        assert_eq!((mac.free(), mac.gpu_share()), (None, None));
    }
}
