//! Checks of the repository itself that the compiler and clippy do not make.
//!
//! Every finding says where it is, which rule it breaks and what to do about it. The constants at the top of each
//! module are the rules; to change one is a decision, to be argued in the commit that changes it.

/// Files of a crate that need each other.
mod circles;
/// What the code says.
mod code;
/// What the crates depend on.
mod crates;
/// Which file of a crate names which.
mod edges;
/// What files define.
mod items;
/// Names that mean one thing.
mod names;
/// Command line options.
mod options;
/// The paths that a file writes.
mod paths;
/// What the files are called, how large they are, and what the READMEs say of them.
mod repository;
/// Rooms, circles and imports within a crate.
mod structure;
/// All of that in numbers.
mod table;
/// The crates' sources as syntax.
mod tree;

use std::path::Path;
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn report(findings: &[String]) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

/// The same of findings that have a key each. What `exceptions` lists with a reason is let pass; what it lists and
/// nothing needs is a finding too.
fn report_except(findings: &[(String, String)], exceptions: &[(&str, &str)], list: &str) {
    let is_listed = |key: &str| exceptions.iter().any(|(listed, _)| *listed == key);
    let new = findings.iter().filter(|(key, _)| !is_listed(key));
    let mut report_on: Vec<_> = new
        .map(|(key, finding)| format!("{finding} (or list \"{key}\" in {list}, with a reason)"))
        .collect();
    let is_needed = |listed: &str| findings.iter().any(|(key, _)| key == listed);
    let stale = exceptions.iter().filter(|(listed, _)| !is_needed(listed));
    report_on.extend(stale.map(|(listed, _)| {
        format!("{list} in tests/tidy: \"{listed}\" is no exception any more; delete it there")
    }));
    report(&report_on);
}

/// The paths, from the root, of what git tracks or would track; without git, of what is there.
fn files() -> Vec<String> {
    let options = ["--cached", "--others", "--exclude-standard", "-z"];
    let output = Command::new("git")
        .args(["-C", ROOT, "ls-files"])
        .args(options)
        .output();
    let listed = output.map(|output| output.stdout).unwrap_or_default();
    let listed = String::from_utf8_lossy(&listed);
    let mut files: Vec<_> = listed.split_terminator('\0').map(str::to_owned).collect();
    // The root may also lie unpacked in a folder that some other repository ignores.
    if !files.iter().any(|path| path == "Cargo.toml") {
        files.clear();
        walk("", &mut files);
    }
    // Git also lists what was deleted since the last commit.
    files.retain(|path| Path::new(ROOT).join(path).is_file());
    files
}

fn walk(folder: &str, files: &mut Vec<String>) {
    let entries = std::fs::read_dir(Path::new(ROOT).join(folder));
    for entry in entries
        .unwrap_or_else(|e| panic!("{folder}: {e}"))
        .flatten()
    {
        let path = format!("{folder}{}", entry.file_name().to_string_lossy());
        if !entry.path().is_dir() {
            files.push(path);
        } else if ![".git", "target", "runs"].contains(&path.as_str()) {
            walk(&format!("{path}/"), files);
        }
    }
}

fn sources() -> Vec<String> {
    files()
        .into_iter()
        .filter(|path| path.ends_with(".rs"))
        .collect()
}

fn folder(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn bytes(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(ROOT).join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A file's text, unless it is binary.
fn text(path: &str) -> Option<String> {
    String::from_utf8(bytes(path))
        .ok()
        .filter(|text| !text.contains('\0'))
}

fn read(path: &str) -> String {
    text(path).unwrap_or_else(|| panic!("{path}: must be text"))
}

/// Whether `text` has `word`, and not only as a part of a longer word.
fn has(text: &str, word: &str) -> bool {
    let is_inner = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(start, _)| {
        let (before, after) = (&text[..start], &text[start + word.len()..]);
        let began = word.starts_with(is_inner) && before.ends_with(is_inner);
        let goes_on = word.ends_with(is_inner) && after.starts_with(is_inner);
        !began && !goes_on
    })
}
