//! Circles: files of a crate each of which needs all others, so that none can be understood or moved alone.

use super::edges::{Edge, Reexports, edges};
use super::tree::{Crate, crates, made_up};

/// The circles of a graph, the largest first: indices of files, in order.
pub(super) fn circles(n_files: usize, edges: &[Edge]) -> Vec<Vec<usize>> {
    let reached: Vec<_> = (0..n_files)
        .map(|file| reached(file, n_files, edges))
        .collect();
    let mut circles: Vec<Vec<usize>> = Vec::new();
    for (file, from_here) in reached.iter().enumerate() {
        let circle: Vec<_> = (0..n_files)
            .filter(|&other| from_here[other] && reached[other][file])
            .collect();
        // A circle is found once, from its first file.
        if circle.first() == Some(&file) && circle.len() > 1 {
            circles.push(circle);
        }
    }
    circles.sort_by_key(|circle| std::cmp::Reverse(circle.len()));
    circles
}

/// Which files an edge or several lead to from `start`.
fn reached(start: usize, n_files: usize, edges: &[Edge]) -> Vec<bool> {
    let (mut reached, mut waiting) = (vec![false; n_files], vec![start]);
    while let Some(from) = waiting.pop() {
        for edge in edges.iter().filter(|edge| edge.from == from) {
            if !std::mem::replace(&mut reached[edge.to], true) {
                waiting.push(edge.to);
            }
        }
    }
    reached
}

/// Whether a circle is a parent module with children of its own and nothing else.
pub(super) fn is_family(source: &Crate, circle: &[usize]) -> bool {
    let module = |file: usize| source.files[file].module.as_slice();
    circle.iter().any(|&parent| {
        let mut others = circle.iter().filter(|&&file| file != parent);
        others.all(|&file| {
            module(file)
                .split_last()
                .is_some_and(|(_, outer)| outer == module(parent))
        })
    })
}

/// Each circle as the paths of its files.
#[cfg(test)]
fn paths(files: &[(&str, &str)], reexports: Reexports) -> Vec<(Vec<String>, bool)> {
    let [source] = crates(&made_up(files)).try_into().ok().expect("one crate");
    let circles = circles(source.files.len(), &edges(&source, reexports));
    let described = circles.iter().map(|circle| {
        let paths = circle
            .iter()
            .map(|&file| source.files[file].module.join("::"));
        (paths.collect(), is_family(&source, circle))
    });
    described.collect()
}

/// A crate in which `a` and `b` need each other, and `c` and its child.
const TREE: [(&str, &str); 6] = [
    (
        "crates/k/src/lib.rs",
        "mod a; mod b; mod c; mod d; pub use a::A;",
    ),
    (
        "crates/k/src/a.rs",
        "use crate::d::{B, external::X}; use std::fmt; pub struct A(B);",
    ),
    (
        "crates/k/src/b.rs",
        "pub struct B; fn f() { assert!(crate::A::is(1)); }",
    ),
    (
        "crates/k/src/c.rs",
        "mod e; pub use e::E; pub fn own() { use e as inner; inner::E::new(); }",
    ),
    (
        "crates/k/src/c/e.rs",
        "pub struct E; fn g() { super::own(); }",
    ),
    (
        "crates/k/src/d.rs",
        "pub use super::b::*; #[cfg(test)] use crate::c::own;",
    ),
];

#[test]
fn circles_follow_imports_macros_and_what_is_handed_on() {
    let circle = |names: [&str; 2], is_family| (names.map(str::to_owned).to_vec(), is_family);
    let expected = [circle(["a", "b"], false), circle(["c", "c::e"], true)];
    assert_eq!(paths(&TREE, Reexports::LeftOut), expected);
}

#[test]
fn contents_pages_are_in_circles_only_if_counted() {
    let mut tree = TREE;
    tree[4].1 = "pub struct E;";
    tree[3].1 = "mod e; pub use e::E; pub fn own() {}";
    assert_eq!(paths(&tree, Reexports::LeftOut).len(), 1);
    tree[4].1 = "pub struct E; fn g() { super::own(); }";
    assert_eq!(paths(&tree, Reexports::LeftOut).len(), 1);
    assert_eq!(paths(&tree, Reexports::Counted).len(), 2);
}
