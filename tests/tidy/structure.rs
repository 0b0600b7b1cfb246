//! Rooms: the order of a crate's modules, circles between its files, and where its code imports from.

use std::collections::BTreeMap;

use super::circles::{circles, is_family};
use super::edges::{Edge, Reexports, edges};
use super::tree::{Crate, Sources, crates, made_up, repository};
use super::{TODAY, report_except};

/// The modules directly below a crate's root, in an order in which each names only itself and those before it.
/// `settings` has no operations, and `forward` none of the modules that are handed it.
const ROOMS: [(&str, &[&str]); 2] = [
    (
        "kernels",
        &[
            "error", "memory", "threads", "simd", "formats", "settings", "matmul", "gemv", "ops",
            "backend",
        ],
    ),
    (
        "model",
        &[
            "error",
            "config",
            "rope",
            "keys",
            "precision",
            "forward", // Context, recorder, cache.
            "modules",
            "decoder",
            "load",
            "adapt",
            "export",
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
const CIRCLES: &[(&str, &str)] = &[];
/// The crates whose code imports from rooms, never from the crate's root, so that every arrow is seen.
const IMPORT_FROM_ROOMS: [&str; 1] = ["kernels"];
const IMPORTS_FROM_ROOT: &[(&str, &str)] = &[];

#[test]
fn rooms_name_only_the_rooms_before_them() {
    let sources = repository();
    let mut findings = Vec::new();
    for (name, rooms) in ROOMS {
        findings.extend(out_of_order(&Crate::parse(name, &sources), rooms));
    }
    let (unplaced, backward): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|(key, _)| !key.contains('→'));
    report_except(&backward, BACKWARD, "BACKWARD");
    report_except(&unplaced, UNPLACED, "UNPLACED");
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

/// Modules without a place in `rooms`, and edges to a later room.
fn out_of_order(source: &Crate, rooms: &[&str]) -> Vec<(String, String)> {
    let place = |file: usize| {
        let room = source.files[file].module.first()?;
        Some((rooms.iter().position(|name| name == room), room.as_str()))
    };
    let mut findings = BTreeMap::new();
    for (file_idx, file) in source.files.iter().enumerate().filter(|(_, file)| file.module.len() == 1) {
        if let Some((None, room)) = place(file_idx) {
            let finding = format!(
                "{}: `{room}` has no place in the order of rooms; move it into one of {rooms:?}",
                file.path
            );
            findings.insert(format!("{}::{room}", source.name), finding);
        }
    }
    for edge in edges(source, Reexports::LeftOut) {
        let (Some((Some(from), from_room)), Some((Some(to), to_room))) = (place(edge.from), place(edge.to)) else {
            continue;
        };
        if to > from {
            let finding = format!(
                "{}: `{from_room}` comes before `{to_room}` and must not name it; move what both need down",
                line(source, &edge)
            );
            findings.entry(format!("{}: {from_room} → {to_room}", source.name)).or_insert(finding);
        }
    }
    findings.into_iter().collect()
}

/// The circles that are not a parent with its own children, or too large.
fn wrong_circles(source: &Crate) -> Vec<(String, String)> {
    let circles = circles(source.files.len(), &edges(source, Reexports::LeftOut));
    let is_wrong = |circle: &Vec<usize>| circle.len() > LARGEST_CIRCLE || !is_family(source, circle);
    let finding = |circle: Vec<usize>| {
        let modules: Vec<_> = circle.iter().map(|&file| source.files[file].module.join("::")).collect();
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
    edges.filter(|edge| edge.through_root).map(finding).collect()
}

fn line(source: &Crate, edge: &Edge) -> String {
    format!("{}:{}", source.files[edge.from].path, edge.line)
}

/// A crate with rooms `low` and `high`, in which `low` names `high`, a circle of five, and a name from the root.
fn wrong_tree() -> Sources {
    made_up(&[
        ("crates/k/src/lib.rs", "mod low; mod high; mod attic;\npub use high::High;"),
        ("crates/k/src/low.rs", "mod a; mod b; mod c; mod d;\nuse crate::High;\nfn f(_: High) { a::a() }"),
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
    let keys = |findings: Vec<(String, String)>| findings.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    assert_eq!(keys(out_of_order(&source, &["low", "high"])), ["k: low → high", "k::attic"]);
    assert_eq!(keys(out_of_order(&source, &["high", "low", "attic"])), [""; 0]);
    assert_eq!(keys(wrong_circles(&source)), ["k 5"]);
    let imports = imports_from_root(&source);
    assert_eq!(imports.len(), 1, "{imports:?}");
    assert!(imports[0].1.starts_with("crates/k/src/low.rs:2: `High`"), "{imports:?}");
}
