//! The memory that Linux control groups leave a program, in containers and services with a limit.
//!
//! Each group has a limit and counts the memory of the groups in it. Cached files count too, until their pages are
//! reclaimed. Both versions of control groups are read, because systems mix them.
//!
//! Source: the kernel's documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst.

use std::path::{Path, PathBuf};

use super::{Machine, MemoryLimit};

/// The files of a version of control groups.
struct CgroupVersion {
    /// The folder of the outermost group.
    root: &'static str,
    /// Files of limits.
    limits: &'static [&'static str],
    usage: &'static str,
    /// Names in `memory.stat` of reclaimable memory.
    reclaimable: &'static [&'static str],
}

const V1: CgroupVersion = CgroupVersion {
    root: "memory",
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: &["total_active_file", "total_inactive_file"],
};
const V2: CgroupVersion = CgroupVersion {
    root: "",
    // Above `memory.high` the kernel does not end a program, but slows it to a crawl.
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: &["active_file", "inactive_file", "slab_reclaimable"],
};

/// The memory left by the tightest limit of a machine's groups, if there is one.
pub(super) fn tightest(machine: &Machine) -> Option<MemoryLimit> {
    let groups = machine.text("proc/self/cgroup")?;
    least(&groups, &machine.path("sys/fs/cgroup"))
}

/// The memory left by groups as listed in `/proc/self/cgroup`, with their files in a folder.
fn least(groups: &str, files: &Path) -> Option<MemoryLimit> {
    let left = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let version = match controllers {
            "" => &V2,
            list if list.split(',').any(|name| name == "memory") => &V1,
            _ => return None,
        };
        version.least(&files.join(version.root), path)
    });
    left.min_by_key(|limit| limit.bytes)
}

impl CgroupVersion {
    /// The least memory left by a group and its ancestors. In a container the path may be the host's: of its groups,
    /// only the container's outermost exists then.
    fn least(&self, root: &Path, path: &str) -> Option<MemoryLimit> {
        let group = root.join(path.trim_start_matches('/'));
        let groups = group
            .ancestors()
            .take_while(|group| group.starts_with(root));
        let left = groups.filter_map(|group| {
            let bytes = self.left(group)?;
            let name = group.strip_prefix(root).unwrap_or(group).display();
            let source = format!("control group /{name}");
            Some(MemoryLimit { bytes, source })
        });
        left.min_by_key(|limit| limit.bytes)
    }

    /// The memory left by a group, if it has a limit.
    fn left(&self, group: &Path) -> Option<u64> {
        let limits = self.limits.iter().map(|name| number(&group.join(name)));
        let limit = limits.flatten().min()?;
        let used = number(&group.join(self.usage))?;
        let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let lines = stat.lines().filter_map(|line| line.split_once(' '));
        let reclaimable = lines
            .filter(|(name, _)| self.reclaimable.contains(name))
            .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok());
        let used = used.saturating_sub(reclaimable.sum());
        Some(limit.saturating_sub(used))
    }
}

/// The number in a file; none if it says `max`.
fn number(file: &PathBuf) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group's files.
    fn group(folder: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }

    /// The bytes that are left.
    fn left(groups: &str, files: &Path) -> Option<u64> {
        least(groups, files).map(|limit| limit.bytes)
    }

    #[test]
    fn the_tightest_limit_of_a_group_and_those_around_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path();
        let groups = "0::/user.slice/app.service\n";
        assert_eq!(left(groups, files), None);
        group(
            &files.join("user.slice/app.service"),
            &[("memory.max", "max\n"), ("memory.current", "600\n")],
        );
        assert_eq!(left(groups, files), None);
        group(
            &files.join("user.slice"),
            &[
                ("memory.max", "5000\n"),
                ("memory.current", "3000\n"),
                (
                    "memory.stat",
                    "anon 2100\nfile 900\nactive_file 400\ninactive_file 450\nslab_reclaimable 50\n",
                ),
            ],
        );
        assert_eq!(left(groups, files), Some(2900));
        group(
            &files.join("user.slice/app.service"),
            &[("memory.high", "1000\n")],
        );
        assert_eq!(left(groups, files), Some(400));
        assert_eq!(left("0::/\n", files), None);
    }

    #[test]
    fn the_first_version_counts_where_it_has_memory() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path();
        group(
            &files.join("memory"),
            &[
                ("memory.limit_in_bytes", "1000\n"),
                ("memory.usage_in_bytes", "700\n"),
                (
                    "memory.stat",
                    "active_file 1\ntotal_active_file 50\ntotal_inactive_file 150\n",
                ),
            ],
        );
        // The host's path, which a container does not see.
        let groups = "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n";
        assert_eq!(left(groups, files), Some(500));
        group(
            &files.join("memory/docker/1f"),
            &[
                ("memory.limit_in_bytes", "800\n"),
                ("memory.usage_in_bytes", "900\n"),
            ],
        );
        assert_eq!(left(groups, files), Some(0));
        assert_eq!(left("5:cpu:/docker/1f\n", files), None);
    }
}
