//! Rooms: the order of a crate's modules, circles between its files, and where its code imports from.

use std::collections::BTreeMap;

use super::circles::{circles, is_family};
use super::edges::{Edge, Reexports, edges};
use super::report_except;
use super::tree::{Crate, Sources, crates, made_up, repository};

/// The modules directly below a crate's root, in an order in which each names only itself and those before it.
/// `settings` has no operations, `matmul` decides which products are `gemv`'s, and `forward` is what the `modules` are
/// handed: a context, a recorder, a cache. A room may be a file or a folder, and need not be there yet.
const ROOMS: [(&str, &[&str]); 2] = [
    (
        "kernels",
        &[
            "error", "memory", "threads", "simd", "settings", "formats", "gemv", "matmul", "ops",
            "backend", "device",
        ],
    ),
    (
        "model",
        &[
            "error",
            "config",
            "rope",
            "keys",
            "patterns",
            "precision",
            "precision_table",
            "forward",
            "modules",
            "decoder",
            "load",
            "adapt",
            "export",
            "footprint",
        ],
    ),
];
/// Modules that have no place in ROOMS.
const UNPLACED: &[(&str, &str)] = &[];
/// Pairs of rooms of which the first names the second, though it comes after it.
const BACKWARD: &[(&str, &str)] = &[];
/// Files of a circle.
const LARGEST_CIRCLE: usize = 4;
/// A crate and the files of a circle that is no parent with its own children, or too large.
const CIRCLES: &[(&str, &str)] = &[
    (
        "checkpoint 2",
        "an error names the dtype it was about, and reading a dtype fails with an error",
    ),
    (
        "kernels 12",
        "a trait's default bodies are the plain definitions, which are written in the trait's operations",
    ),
    (
        "kernels 4",
        "numbers, integers and what both stand on: counting gives integers, and comparing them gives numbers",
    ),
    (
        "data 9",
        "a value of the template language may be a macro, which is a piece of a program that makes values",
    ),
    (
        "data 4",
        "operators of the template language format texts, and formatted and marked texts have operators",
    ),
];
/// The crates whose code imports from rooms, never from the crate's root, so that every arrow is seen.
const IMPORT_FROM_ROOMS: [&str; 1] = ["kernels"];
const IMPORTS_FROM_ROOT: &[(&str, &str)] = &[];

#[test]
fn rooms_name_only_the_rooms_before_them() {
    let sources = repository();
    let findings = ROOMS.map(|(name, rooms)| backward(&Crate::parse(name, &sources), rooms));
    report_except(&findings.concat(), BACKWARD, "BACKWARD");
}

#[test]
fn modules_have_a_place_among_the_rooms() {
    let sources = repository();
    let findings = ROOMS.map(|(name, rooms)| unplaced(&Crate::parse(name, &sources), rooms));
    report_except(&findings.concat(), UNPLACED, "UNPLACED");
}

#[test]
fn circles_are_a_parent_and_its_children() {
    let crates = crates(&repository());
    let findings: Vec<_> = crates.iter().flat_map(wrong_circles).collect();
    report_except(&findings, CIRCLES, "CIRCLES");
}

#[test]
fn code_imports_from_rooms() {
    let sources = repository();
    let crates = IMPORT_FROM_ROOMS.map(|name| Crate::parse(name, &sources));
    let findings: Vec<_> = crates.iter().flat_map(imports_from_root).collect();
    report_except(&findings, IMPORTS_FROM_ROOT, "IMPORTS_FROM_ROOT");
}

/// Modules below the root without a place in `rooms`.
fn unplaced(source: &Crate, rooms: &[&str]) -> Vec<(String, String)> {
    let mut findings = Vec::new();
    for file in &source.files {
        let [room] = file.module.as_slice() else {
            continue;
        };
        if !rooms.contains(&room.as_str()) {
            let finding = format!(
                "{}: `{room}` has no place in the order of rooms; move it into one of {rooms:?}",
                file.path
            );
            findings.push((format!("{}::{room}", source.name), finding));
        }
    }
    findings
}

/// Rooms that name a later one; rooms that are not there yet are named by none.
fn backward(source: &Crate, rooms: &[&str]) -> Vec<(String, String)> {
    let place = |file: usize| {
        let room = source.files[file].module.first()?;
        rooms.iter().position(|name| name == room)
    };
    let mut findings = BTreeMap::new();
    for edge in edges(source, Reexports::LeftOut) {
        let (Some(from), Some(to)) = (place(edge.from), place(edge.to)) else {
            continue;
        };
        if to > from {
            let (from, to) = (rooms[from], rooms[to]);
            let finding = format!(
                "{}: `{from}` comes before `{to}` and must not name `{}`; move what both need down",
                line(source, &edge),
                edge.path
            );
            findings
                .entry(format!("{}: {from} → {to}", source.name))
                .or_insert(finding);
        }
    }
    findings.into_iter().collect()
}

/// The circles that are not a parent with its own children, or too large.
fn wrong_circles(source: &Crate) -> Vec<(String, String)> {
    let circles = circles(source.files.len(), &edges(source, Reexports::LeftOut));
    let is_wrong =
        |circle: &Vec<usize>| circle.len() > LARGEST_CIRCLE || !is_family(source, circle);
    let finding = |circle: Vec<usize>| {
        let modules: Vec<_> = circle
            .iter()
            .map(|&file| source.files[file].module.join("::"))
            .collect();
        let finding = format!(
            "crates/{}: {} need each other; only a parent and its own children may, at most \
             {LARGEST_CIRCLE} files: move what they share into a file below them",
            source.name,
            modules.join(", ")
        );
        (format!("{} {}", source.name, circle.len()), finding)
    };
    circles.into_iter().filter(is_wrong).map(finding).collect()
}

/// Names that code takes from the crate's root, which only hands them on.
fn imports_from_root(source: &Crate) -> Vec<(String, String)> {
    let edges = edges(source, Reexports::LeftOut).into_iter();
    let finding = |edge: Edge| {
        let module = source.files[edge.to].module.join("::");
        let finding = format!(
            "{}: `{}` is only handed on by the crate's root; name it in `crate::{module}`, or in the room around that",
            line(source, &edge),
            edge.path
        );
        (source.name.clone(), finding)
    };
    edges
        .filter(|edge| edge.through_root)
        .map(finding)
        .collect()
}

fn line(source: &Crate, edge: &Edge) -> String {
    format!("{}:{}", source.files[edge.from].path, edge.line)
}

/// A crate with rooms `low` and `high`, in which `low` names `high`, a circle of five, and a name from the root.
fn wrong_tree() -> Sources {
    made_up(&[
        (
            "crates/k/src/lib.rs",
            "mod low; mod high; mod attic;\npub use high::High;",
        ),
        (
            "crates/k/src/low.rs",
            "mod a; mod b; mod c; mod d;\nuse crate::High;\nfn f(_: High) { a::a() }",
        ),
        ("crates/k/src/low/a.rs", "pub fn a() { super::b::b() }"),
        ("crates/k/src/low/b.rs", "pub fn b() { super::c::c() }"),
        ("crates/k/src/low/c.rs", "pub fn c() { super::d::d() }"),
        ("crates/k/src/low/d.rs", "pub fn d() { super::f() }"),
        ("crates/k/src/high.rs", "pub struct High;"),
        ("crates/k/src/attic.rs", "use crate::low::f;"),
    ])
}

#[test]
fn wrong_trees_are_found() {
    let source = Crate::parse("k", &wrong_tree());
    let keys = |findings: Vec<(String, String)>| {
        findings.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
    };
    assert_eq!(keys(unplaced(&source, &["low", "high"])), ["k::attic"]);
    assert_eq!(keys(backward(&source, &["low", "high"])), ["k: low → high"]);
    assert_eq!(keys(backward(&source, &["high", "low", "attic"])), [""; 0]);
    assert_eq!(keys(wrong_circles(&source)), ["k 5"]);
    let imports = imports_from_root(&source);
    assert_eq!(imports.len(), 1, "{imports:?}");
    assert!(
        imports[0].1.starts_with("crates/k/src/low.rs:2: `High`"),
        "{imports:?}"
    );
}
