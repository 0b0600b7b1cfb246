use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use toml::{Table, Value};

use super::{ROOT, files, folder, read, report};

/// What each crate may name of ours, as `crates/README.md` shows it. `cli`, the root package, may name everything.
const ARROWS: [(&str, &[&str]); 8] = [
    ("kernels", &[]),
    ("checkpoint", &[]),
    ("data", &[]),
    ("parallel", &[]),
    ("model", &["kernels", "checkpoint", "parallel"]),
    (
        "train",
        &["model", "data", "checkpoint", "kernels", "parallel"],
    ),
    ("infer", &["model", "data", "kernels", "checkpoint"]),
    ("eval", &["infer", "model", "data"]),
];
/// Crates on the longest way down, `cli` not counted.
const LONGEST_CHAIN: usize = 5;
/// The crates that may name burn. The others build quickly, and are of use without it.
const BURN: [&str; 6] = ["kernels", "model", "train", "infer", "eval", "cli"];
/// Direct dependencies of the whole workspace, those of tests not counted.
const MOST_DEPENDENCIES: usize = 30;
/// The heading in `crates/README.md` above the table with a row for each direct dependency.
const DEPENDENCIES: &str = "\n## Dependencies\n";

#[test]
fn crates_name_only_the_crates_below_them() {
    let mut findings = Vec::new();
    for Manifest { name, path, table } in
        manifests().iter().filter(|manifest| manifest.name != "cli")
    {
        let Some((_, allowed)) = ARROWS.iter().find(|(crate_name, _)| crate_name == name) else {
            findings.push(format!(
                "{path}: `{name}` has no arrows; add it to ARROWS and to crates/README.md"
            ));
            continue;
        };
        for named in ours(table)
            .iter()
            .filter(|named| !allowed.contains(&named.as_str()))
        {
            findings.push(format!(
                "{path}: `{name}` must not name `{named}`, nor may its tests; move the code to a crate that may"
            ));
        }
    }
    report(&findings);
}

/// Crates by which one knows a GPU's or MPI's, by the beginnings of their names.
const OPTIONAL: [&str; 7] = [
    "wgpu",
    "naga",
    "cubek",
    "cubecl-core",
    "cubecl-runtime",
    "burn-cubecl",
    "mpi",
];

#[test]
fn a_default_build_has_no_crate_of_gpus_or_mpi() {
    let tree = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--workspace",
            "--edges",
            "normal",
            "--prefix",
            "none",
        ])
        .args(["--locked", "--offline"])
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(
        tree.status.success(),
        "{}",
        String::from_utf8_lossy(&tree.stderr)
    );
    let tree = String::from_utf8_lossy(&tree.stdout);
    assert!(
        tree.lines().any(|line| line.starts_with("burn-flex ")),
        "{tree}"
    );
    let is_of_gpu = |line: &&str| OPTIONAL.iter().any(|name| line.starts_with(name));
    let found: Vec<_> = tree.lines().filter(is_of_gpu).collect();
    assert!(
        found.is_empty(),
        "the default features bring {found:?}; gate them with `gpu`"
    );
}

#[test]
fn crate_chains_are_short() {
    let crates = manifests()
        .into_iter()
        .filter(|manifest| manifest.name != "cli");
    let arrows: BTreeMap<_, _> = crates
        .map(|manifest| (manifest.name, ours(&manifest.table)))
        .collect();
    for name in arrows.keys() {
        let count = chain(name, &arrows, 2 * LONGEST_CHAIN);
        assert!(
            count <= LONGEST_CHAIN,
            "crates/{name}/Cargo.toml: {count} crates on the way down, at most {LONGEST_CHAIN}; merge two of them"
        );
    }
}

#[test]
fn architecture_page_shows_the_arrows() {
    let page = read("crates/README.md");
    let mut findings = Vec::new();
    for (name, allowed) in ARROWS {
        let allowed: Vec<_> = allowed.iter().map(|name| format!("`{name}`")).collect();
        let named = if allowed.is_empty() {
            "none".to_owned()
        } else {
            allowed.join(", ")
        };
        let row = format!("| `{name}` | {named} |");
        if !page.contains(&row) {
            findings.push(format!(
                "crates/README.md: lacks the row `{row}` of the table of arrows; add it"
            ));
        }
    }
    report(&findings);
}

#[test]
fn arrows_are_of_crates_that_exist() {
    let folders: BTreeSet<_> = manifests()
        .into_iter()
        .map(|manifest| manifest.name)
        .collect();
    let named = ARROWS
        .iter()
        .flat_map(|(name, allowed)| allowed.iter().chain([name]));
    let gone = named.filter(|name| !folders.contains(**name));
    let findings =
        gone.map(|name| format!("crates/{name}: is not there; delete `{name}` from ARROWS"));
    report(&findings.collect::<Vec<_>>());
}

#[test]
fn burn_is_pinned_once_and_named_by_few() {
    let mut findings = Vec::new();
    let workspace = workspace_dependencies();
    let burn = workspace
        .iter()
        .filter(|(name, _)| is_burn(name))
        .map(|(_, spec)| spec);
    let pins: BTreeSet<_> = burn
        .map(|spec| {
            spec.get("version")
                .unwrap_or(spec)
                .as_str()
                .unwrap_or("none")
        })
        .collect();
    if pins.len() != 1 || !pins.iter().all(|pin| pin.starts_with('=')) {
        findings.push(format!(
            "Cargo.toml: burn's crates must share one exact version, found {pins:?}; write `=X.Y.Z`"
        ));
    }
    for Manifest { name, path, table } in manifests()
        .iter()
        .filter(|manifest| !BURN.contains(&manifest.name.as_str()))
    {
        for burn in dependencies(table)
            .iter()
            .filter(|dependency| is_burn(&dependency.name))
        {
            findings.push(format!(
                "{path}: `{name}` must not name `{}`; put tensor code into kernels or above",
                burn.name
            ));
        }
    }
    report(&findings);
}

#[test]
fn dependencies_have_one_source() {
    let mut findings = Vec::new();
    for Manifest { path, table, .. } in manifests() {
        let inherits = |spec: &Value| spec.get("workspace").and_then(Value::as_bool) == Some(true);
        for Dependency { name, .. } in dependencies(&table)
            .iter()
            .filter(|dependency| !inherits(&dependency.spec))
        {
            findings.push(format!(
                "{path}: `{name}` has a source of its own; move that to [workspace.dependencies], write `workspace = true`"
            ));
        }
        for replaced in ["patch", "replace"]
            .iter()
            .filter(|section| table.contains_key(**section))
        {
            findings.push(format!(
                "{path}: [{replaced}] puts something else in a release's place; depend on a release"
            ));
        }
    }
    for (name, spec) in workspace_dependencies() {
        let is_outside = |path: &str| !path.starts_with("crates/") || path.contains("..");
        if spec.get("git").is_some()
            || spec
                .get("path")
                .and_then(Value::as_str)
                .is_some_and(is_outside)
        {
            findings.push(format!(
                "Cargo.toml: `{name}` comes from git or a folder outside; depend on a release"
            ));
        }
    }
    if read("Cargo.lock").contains("\"git+") {
        findings.push(
            "Cargo.lock: a dependency's dependency comes from git; choose another release of it"
                .to_owned(),
        );
    }
    report(&findings);
}

#[test]
fn direct_dependencies_are_few() {
    let external = direct_dependencies().into_iter();
    let shipped = external.filter(|dependency| !dependency.for_tests);
    let names: BTreeSet<_> = shipped.map(|dependency| dependency.name).collect();
    assert!(
        names.len() <= MOST_DEPENDENCIES,
        "Cargo.toml: {} direct dependencies, at most {MOST_DEPENDENCIES}; do without one of {names:?}",
        names.len()
    );
}

#[test]
fn every_dependency_is_argued_for() {
    let page = read("crates/README.md");
    // Until the page has the table, there is nothing to hold it to.
    let Some((_, section)) = page.split_once(DEPENDENCIES) else {
        return;
    };
    let section = section.split("\n## ").next().unwrap_or_default();
    let names: BTreeSet<_> = direct_dependencies()
        .into_iter()
        .map(|dependency| dependency.name)
        .collect();
    let lacking = names
        .iter()
        .filter(|name| !is_in_first_column(section, name));
    let finding = |name| {
        format!(
            "crates/README.md: the table of dependencies lacks `{name}`; say what it is for and what we would write instead"
        )
    };
    report(&lacking.map(finding).collect::<Vec<_>>());
}

#[test]
fn rows_are_found_by_their_first_column() {
    let section = "| package | for |\n|---|---|\n| `a`, `b-c` | with `d` |\n";
    let found = ["a", "b-c", "c", "d"].map(|name| is_in_first_column(section, name));
    assert_eq!(found, [true, true, false, false]);
}

/// Whether a row of a Markdown table has `name` in backticks in its first column.
fn is_in_first_column(section: &str, name: &str) -> bool {
    let rows = section.lines().filter_map(|line| line.strip_prefix('|'));
    let mut columns = rows.filter_map(|row| row.split('|').next());
    columns.any(|column| column.contains(&format!("`{name}`")))
}

struct Manifest {
    /// The name of the crate's folder, or `cli` for the root package.
    name: String,
    path: String,
    table: Table,
}

struct Dependency {
    name: String,
    spec: Value,
    for_tests: bool,
}

/// The manifests of the workspace: `fuzz/` is another.
fn manifests() -> Vec<Manifest> {
    let is_ours = |path: &String| {
        path == "Cargo.toml" || path.starts_with("crates/") && path.ends_with("/Cargo.toml")
    };
    let paths = files().into_iter().filter(is_ours);
    let manifest = |path: String| Manifest {
        name: folder(&path)
            .strip_prefix("crates/")
            .unwrap_or("cli")
            .to_owned(),
        table: parse(&path),
        path,
    };
    paths.map(manifest).collect()
}

fn parse(path: &str) -> Table {
    read(path).parse().unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn dependencies(manifest: &Table) -> Vec<Dependency> {
    let targets = manifest
        .get("target")
        .and_then(Value::as_table)
        .into_iter()
        .flat_map(Table::values);
    let mut dependencies = Vec::new();
    for table in targets.filter_map(Value::as_table).chain([manifest]) {
        for section in ["dependencies", "build-dependencies", "dev-dependencies"] {
            let named = table
                .get(section)
                .and_then(Value::as_table)
                .cloned()
                .unwrap_or_default();
            let for_tests = section == "dev-dependencies";
            dependencies.extend(named.into_iter().map(|(name, spec)| Dependency {
                name,
                spec,
                for_tests,
            }));
        }
    }
    dependencies
}

/// What manifests name that is not ours.
fn direct_dependencies() -> Vec<Dependency> {
    let ours = crates_of_ours();
    let all = manifests()
        .into_iter()
        .flat_map(|manifest| dependencies(&manifest.table));
    all.filter(|dependency| !ours.contains(&dependency.name))
        .collect()
}

fn workspace_dependencies() -> Table {
    parse("Cargo.toml")["workspace"]["dependencies"]
        .as_table()
        .cloned()
        .unwrap_or_default()
}

/// Our crates are those with a path, and they go by the names of their folders.
fn crates_of_ours() -> BTreeSet<String> {
    let ours = workspace_dependencies()
        .into_iter()
        .filter(|(_, spec)| spec.get("path").is_some());
    ours.map(|(name, _)| name).collect()
}

fn ours(manifest: &Table) -> Vec<String> {
    let ours = crates_of_ours();
    let names = dependencies(manifest)
        .into_iter()
        .map(|dependency| dependency.name);
    names.filter(|name| ours.contains(name)).collect()
}

fn is_burn(name: &str) -> bool {
    name == "burn" || name.starts_with("burn-")
}

/// How many crates the longest way down from `name` has; no more than `limit`, should it be a circle.
fn chain(name: &str, arrows: &BTreeMap<String, Vec<String>>, limit: usize) -> usize {
    let below = arrows.get(name).filter(|_| limit > 1).into_iter().flatten();
    1 + below
        .map(|name| chain(name, arrows, limit - 1))
        .max()
        .unwrap_or(0)
}
