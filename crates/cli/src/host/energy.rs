//! The energy that the processors of a machine use, from Linux's counters.
//!
//! Source: the kernel's documentation, power/powercap/powercap.rst. Each processor package has a counter of microjoules that
//! starts again at zero after its largest value.

use super::machine::Machine;

/// The folder of the counters.
const COUNTERS: &str = "sys/class/powercap";
/// What the names of counters begin with; parts of a package have another number behind a colon.
const PACKAGE: &str = "intel-rapl:";

/// Adds up what the counters of all packages say.
#[derive(Debug)]
pub(crate) struct EnergyMeter {
    machine: Machine,
    packages: Vec<Package>,
    microjoules: u64,
}

#[derive(Debug)]
struct Package {
    name: String,
    last: u64,
    /// The largest value of its counter.
    range: u64,
}

impl EnergyMeter {
    /// Counts from now on.
    ///
    /// # Errors
    /// If the machine does not tell: why.
    pub(crate) fn start(machine: &Machine) -> Result<Self, &'static str> {
        if machine.is_mac() {
            return Err("a Mac tells its energy to root only: `sudo powermetrics`");
        }
        let entries = std::fs::read_dir(machine.path(COUNTERS));
        let entries = entries.map_err(|_| "this machine has no energy counters")?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let is_package = |name: &String| {
            let number = name.strip_prefix(PACKAGE);
            number.is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
        };
        let mut names: Vec<String> = names.filter(is_package).collect();
        names.sort();
        if names.is_empty() {
            return Err("this machine has no energy counters");
        }
        let packages = names.into_iter().map(|name| {
            Some(Package {
                last: number(machine, &name, "energy_uj")?,
                range: number(machine, &name, "max_energy_range_uj")?,
                name,
            })
        });
        let packages: Option<Vec<Package>> = packages.collect();
        Ok(Self {
            machine: machine.clone(),
            packages: packages.ok_or("only root may read this machine's energy counters")?,
            microjoules: 0,
        })
    }

    /// Joules since the start. To be asked more often than a counter starts again, which takes many minutes.
    pub(crate) fn joules(&mut self) -> f64 {
        for package in &mut self.packages {
            let Some(now) = number(&self.machine, &package.name, "energy_uj") else {
                continue;
            };
            let range = if now < package.last { package.range } else { 0 };
            self.microjoules += (now + range).saturating_sub(package.last);
            package.last = now;
        }
        self.microjoules as f64 / 1e6
    }
}

fn number(machine: &Machine, package: &str, file: &str) -> Option<u64> {
    let text = machine.text(&format!("{COUNTERS}/{package}/{file}"))?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn count(root: &Path, package: &str, microjoules: u64) {
        let folder = root.join(COUNTERS).join(package);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("energy_uj"), format!("{microjoules}\n")).unwrap();
        std::fs::write(folder.join("max_energy_range_uj"), "10000000\n").unwrap();
    }

    #[test]
    fn packages_add_up_and_counters_start_again() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::of_folder(dir.path());
        assert!(
            EnergyMeter::start(&machine)
                .unwrap_err()
                .contains("no energy counters")
        );
        count(dir.path(), "intel-rapl:0", 9_000_000);
        count(dir.path(), "intel-rapl:1", 1_000_000);
        // A part of the first package.
        count(dir.path(), "intel-rapl:0:0", 0);
        let mut meter = EnergyMeter::start(&machine).unwrap();
        assert_eq!(meter.joules(), 0.0);
        count(dir.path(), "intel-rapl:0", 2_500_000);
        count(dir.path(), "intel-rapl:1", 1_500_000);
        count(dir.path(), "intel-rapl:0:0", 5_000_000);
        assert_eq!(meter.joules(), 3.5 + 0.5);
        count(dir.path(), "intel-rapl:0", 2_600_000);
        assert_eq!(meter.joules(), 4.1);
    }

    #[test]
    fn counters_that_cannot_be_read_and_macs_say_why() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(COUNTERS).join("intel-rapl:0")).unwrap();
        let machine = Machine::of_folder(dir.path());
        assert!(
            EnergyMeter::start(&machine)
                .unwrap_err()
                .contains("only root")
        );
        std::fs::write(dir.path().join("vm_stat"), "").unwrap();
        let mac = Machine::of_folder(dir.path());
        assert!(
            EnergyMeter::start(&mac)
                .unwrap_err()
                .contains("powermetrics")
        );
    }
}
