//! Names that mean one thing: of files in a crate, of types and constants in the workspace, of parameters.

use std::collections::{BTreeMap, BTreeSet};

use super::items::Items;
use super::report_except;
use super::tree::{Crate, Sources, crates, made_up, repository};

/// Files that every folder may have.
const ROOT_FILES: [&str; 3] = ["lib.rs", "main.rs", "mod.rs"];
/// A crate and a name that several of its files have.
const FILE_NAMES: &[(&str, &str)] = &[
    ("kernels: autodiff.rs", "one in every family of operations"),
    (
        "kernels: flex.rs",
        "one in every family of operations, as every other backend will have",
    ),
    (
        "kernels: dropout.rs",
        "what an operation is in burn's own, and on the CPU",
    ),
    (
        "kernels: elementwise.rs",
        "a family in burn's own, and a GPU's kernels of it",
    ),
    (
        "kernels: experts.rs",
        "a family in burn's own, and a GPU's kernels of it",
    ),
    (
        "kernels: linear.rs",
        "a family in burn's own, a GPU's kernels of it, and the CPU's",
    ),
    ("kernels: loss.rs", "a family in burn's own, and on the CPU"),
    (
        "kernels: route.rs",
        "a family in burn's own, a GPU's kernels of it, and the CPU's",
    ),
    (
        "kernels: decode.rs",
        "the form of an operation for decoding, one in every family",
    ),
];
/// Types of one name in several files.
const TYPES: &[(&str, &str)] = &[
    (
        "Args",
        "the arguments of a verb, always behind the verb's name",
    ),
    (
        "Error",
        "one for each crate, always behind the crate's name",
    ),
    ("Result", "with the crate's `Error`"),
];
/// Constants of one name with several values.
const CONSTANTS: &[(&str, &str)] = &[];
/// Parts of a tuple pattern in a function's signature.
const WIDEST_TUPLE: usize = 2;
/// Functions with wider ones.
const TUPLES: &[(&str, &str)] = &[];

#[test]
fn files_of_a_crate_have_names_of_their_own() {
    let findings: Vec<_> = crates(&repository())
        .iter()
        .flat_map(file_names_used_twice)
        .collect();
    report_except(&findings, FILE_NAMES, "FILE_NAMES");
}

#[test]
fn types_have_names_of_their_own() {
    report_except(&types_defined_twice(&crates(&repository())), TYPES, "TYPES");
}

#[test]
fn constants_of_one_name_have_one_value() {
    let findings = constants_with_two_values(&crates(&repository()));
    report_except(&findings, CONSTANTS, "CONSTANTS");
}

#[test]
fn signatures_have_no_wide_tuples() {
    report_except(&wide_tuples(&repository()), TUPLES, "TUPLES");
}

pub(super) fn file_names_used_twice(source: &Crate) -> Vec<(String, String)> {
    let mut places = BTreeMap::<_, Vec<&str>>::new();
    for file in source
        .files
        .iter()
        .filter(|file| !ROOT_FILES.contains(&file.name()))
    {
        places.entry(file.name()).or_default().push(&file.path);
    }
    let shared = places.into_iter().filter(|(_, paths)| paths.len() > 1);
    let finding = |(name, paths): (&str, Vec<&str>)| {
        let finding = format!(
            "{}: files of one name; name each by its own noun",
            paths.join(", ")
        );
        (format!("{}: {name}", source.name), finding)
    };
    shared.map(finding).collect()
}

pub(super) fn types_defined_twice(crates: &[Crate]) -> Vec<(String, String)> {
    let mut places = BTreeMap::<_, BTreeSet<String>>::new();
    for file in crates.iter().flat_map(|source| &source.files) {
        for found in Items::of(&file.syntax).types {
            places
                .entry(found.name)
                .or_default()
                .insert(file.path.clone());
        }
    }
    let shared = places.into_iter().filter(|(_, paths)| paths.len() > 1);
    let finding = |(name, paths): (String, BTreeSet<_>)| {
        let paths: Vec<_> = paths.into_iter().collect();
        let finding = format!(
            "{}: types of one name, `{name}`; say what each is",
            paths.join(", ")
        );
        (name, finding)
    };
    shared.map(finding).collect()
}

pub(super) fn constants_with_two_values(crates: &[Crate]) -> Vec<(String, String)> {
    let mut places = BTreeMap::<_, BTreeMap<String, String>>::new();
    for file in crates.iter().flat_map(|source| &source.files) {
        for found in Items::of(&file.syntax).constants {
            let place = format!("{}:{}", file.path, found.constant.line);
            places
                .entry(found.constant.name)
                .or_default()
                .entry(found.value)
                .or_insert(place);
        }
    }
    let shared = places.into_iter().filter(|(_, values)| values.len() > 1);
    let finding = |(name, values): (String, BTreeMap<_, String>)| {
        let places: Vec<_> = values.into_values().collect();
        let finding = format!(
            "{}: one name, `{name}`, with values that differ; name each",
            places.join(", ")
        );
        (name, finding)
    };
    shared.map(finding).collect()
}

/// Functions, of tests too, with a tuple pattern of more parts than may be.
pub(super) fn wide_tuples(sources: &Sources) -> Vec<(String, String)> {
    let mut findings = Vec::new();
    for (path, text) in sources.iter().filter(|(path, _)| path.ends_with(".rs")) {
        let syntax = syn::parse_file(text).unwrap_or_else(|e| panic!("{path}: {e}"));
        let signatures = Items::of(&syntax).signatures.into_iter();
        for found in signatures.filter(|found| found.widest_tuple > WIDEST_TUPLE) {
            let (name, n_parts) = (found.function.name, found.widest_tuple);
            let finding = format!(
                "{path}:{}: `{name}` has a tuple of {n_parts} as a parameter, at most {WIDEST_TUPLE}; make it \
                 parameters, or a struct where they recur",
                found.function.line
            );
            findings.push((name, finding));
        }
    }
    findings
}

#[test]
fn names_for_two_things_are_found() {
    let sources = made_up(&[
        ("crates/a/src/lib.rs", "mod b; mod c; mod d;"),
        (
            "crates/a/src/b.rs",
            "mod d; pub struct Part; const N: usize = 1; const M: u8 = 1;",
        ),
        (
            "crates/a/src/b/d.rs",
            "fn f((a, b, c): (u8, u8, u8)) {} fn g((a, b): (u8, u8)) {}",
        ),
        (
            "crates/a/src/c.rs",
            "enum Part {} const N: usize = 2; const M: u8 = 1;",
        ),
        ("crates/a/src/d.rs", "#[cfg(test)] struct Part;"),
    ]);
    let keys = |findings: Vec<(String, String)>| {
        findings.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
    };
    let crates = crates(&sources);
    assert_eq!(keys(file_names_used_twice(&crates[0])), ["a: d.rs"]);
    assert_eq!(keys(types_defined_twice(&crates)), ["Part"]);
    assert_eq!(keys(constants_with_two_values(&crates)), ["N"]);
    assert_eq!(keys(wide_tuples(&sources)), ["f"]);
}
