//! The table of the house: how the code is divided, in numbers. Nothing here is a rule; the rules are in
//! `structure.rs`, `names.rs` and `code.rs`.

use std::fmt::Write as _;

use super::bytes;
use super::circles::{circles, is_family};
use super::code::without_comments;
use super::edges::{Reexports, edges};
use super::items::{Items, Signature};
use super::names;
use super::tree::{Crate, File, Sources, crates, made_up, repository};

/// Lines without tests above which a file is long.
const LONG: usize = 500;
/// Parameters above which a function has many.
const MANY_PARAMETERS: usize = 4;
/// Keys of checkpoints that should not be known in many places.
const KEYS: [&str; 2] = ["kv_b_proj", "shared_experts"];

#[test]
#[expect(clippy::print_stdout, reason = "the table is for whoever asks for it")]
fn of_the_house() {
    let sources = repository();
    print!("{}", page(&sources, bytes("README.md").len()));
}

fn page(sources: &Sources, readme_bytes: usize) -> String {
    let crates = crates(sources);
    let mut page = String::from("\n# The house in numbers\n\n");
    page +=
        "Lines and files are those of `src` without tests, comments those of all Rust files.\n\n";
    page +=
        "| crate | files | lines | comment lines | long files | circles | counting `pub use` |\n";
    page += "|---|---:|---:|---:|---:|---|---|\n";
    for source in &crates {
        page += &crate_row(source, sources);
    }
    page += "\n| what | how often | where |\n|---|---:|---|\n";
    for (what, count, places) in measures(&crates, sources, readme_bytes) {
        let _ = writeln!(page, "| {what} | {count} | {places} |");
    }
    page += "\nFiles that need each other:\n\n";
    for source in &crates {
        page += &circle_lines(source);
    }
    page
}

fn crate_row(source: &Crate, sources: &Sources) -> String {
    let sizes = |reexports| {
        let circles = circles(source.files.len(), &edges(source, reexports));
        let sizes: Vec<_> = circles
            .iter()
            .map(|circle| circle.len().to_string())
            .collect();
        if sizes.is_empty() {
            "none".to_owned()
        } else {
            sizes.join(", ")
        }
    };
    let lines: usize = source.files.iter().map(|file| file.n_lines).sum();
    let long = source
        .files
        .iter()
        .filter(|file| file.n_lines > LONG)
        .count();
    format!(
        "| `{}` | {} | {lines} | {:.1} % | {long} | {} | {} |\n",
        source.name,
        source.files.len(),
        100.0 * comment_share(&source.name, sources),
        sizes(Reexports::LeftOut),
        sizes(Reexports::Counted),
    )
}

/// How many of the lines with text, in all Rust files of a crate, have nothing but a comment.
fn comment_share(name: &str, sources: &Sources) -> f64 {
    let folder = format!("crates/{name}/");
    let (mut n_lines, mut n_comments) = (0, 0);
    for (_, text) in sources.iter().filter(|(path, _)| path.starts_with(&folder)) {
        let is_empty = |line: &&str| line.trim().is_empty();
        let n_code = without_comments(text)
            .lines()
            .filter(|line| !is_empty(line))
            .count();
        let n_written = text.lines().filter(|line| !is_empty(line)).count();
        n_lines += n_written;
        n_comments += n_written - n_code;
    }
    f64::from(u32::try_from(n_comments).unwrap_or(0))
        / f64::from(u32::try_from(n_lines).unwrap_or(1).max(1))
}

/// What is counted in all crates: a name for it, the count, and where.
fn measures(
    crates: &[Crate],
    sources: &Sources,
    readme_bytes: usize,
) -> Vec<(String, usize, String)> {
    let keys = |findings: Vec<(String, String)>| {
        let keys: Vec<_> = findings
            .into_iter()
            .map(|(key, _)| format!("`{key}`"))
            .collect();
        (keys.len(), keys.join(", "))
    };
    let mut measures = Vec::new();
    let mut add = |what: &str, (count, places): (usize, String)| {
        measures.push((what.to_owned(), count, places));
    };
    add(
        "functions with more than four parameters",
        functions(crates, |found| found.n_parameters),
    );
    add(
        "the same, counting the parts of tuples",
        functions(crates, |found| found.n_parts),
    );
    add(
        "signatures with a tuple of more than two",
        keys(names::wide_tuples(sources)),
    );
    add(
        "files over 500 lines",
        files(crates, |file| file.n_lines > LONG),
    );
    for key in KEYS {
        let what = format!("files with `{key}` in their code");
        add(&what, files(crates, |file| file.code().contains(key)));
    }
    add(
        "type names in more than one file",
        keys(names::types_defined_twice(crates)),
    );
    add(
        "constants of one name and two values",
        keys(names::constants_with_two_values(crates)),
    );
    let twice = crates.iter().flat_map(names::file_names_used_twice);
    add("file names twice in a crate", keys(twice.collect()));
    add("bytes of the root README", (readme_bytes, String::new()));
    measures
}

/// How many functions have many of what `count` counts, where no trait prescribes their signatures.
fn functions(crates: &[Crate], count: fn(&Signature) -> usize) -> (usize, String) {
    let is_counted = |found: &Signature| !found.is_prescribed && count(found) > MANY_PARAMETERS;
    let in_crate = |source: &Crate| {
        let signatures = source
            .files
            .iter()
            .flat_map(|file| Items::of(&file.syntax).signatures);
        signatures.filter(is_counted).count()
    };
    let counts: Vec<_> = crates
        .iter()
        .map(|source| (&source.name, in_crate(source)))
        .collect();
    let some = counts.iter().filter(|(_, count)| *count > 0);
    let places: Vec<_> = some
        .map(|(name, count)| format!("`{name}` {count}"))
        .collect();
    (
        counts.iter().map(|(_, count)| count).sum(),
        places.join(", "),
    )
}

fn files(crates: &[Crate], is_counted: impl Fn(&File) -> bool) -> (usize, String) {
    let all = crates.iter().flat_map(|source| &source.files);
    let paths = all.filter(|file| is_counted(file)).map(|file| {
        let path = file.path.trim_start_matches("crates/");
        format!("`{}`", path.replacen("/src/", "/", 1))
    });
    let paths: Vec<_> = paths.collect();
    (paths.len(), paths.join(", "))
}

fn circle_lines(source: &Crate) -> String {
    let mut lines = String::new();
    for circle in circles(source.files.len(), &edges(source, Reexports::LeftOut)) {
        let modules = circle
            .iter()
            .map(|&file| format!("`{}`", source.files[file].module.join("::")));
        let modules: Vec<_> = modules.collect();
        let remark = if is_family(source, &circle) {
            " (a parent and its children)"
        } else {
            ""
        };
        let _ = writeln!(
            lines,
            "- `{}`, {} files{remark}: {}",
            source.name,
            circle.len(),
            modules.join(", ")
        );
    }
    lines
}

#[test]
fn page_counts_what_is_there() {
    let sources = made_up(&[
        ("crates/k/src/lib.rs", "//! A crate.\nmod a;\nmod b;\n"),
        (
            "crates/k/src/a.rs",
            "pub fn f(_: u8, _: u8, _: u8, _: u8, _: u8) { crate::b::g(\"kv_b_proj\") }\n",
        ),
        (
            "crates/k/src/b.rs",
            "// kv_b_proj\npub fn g((a, b): T, _: u8, _: u8, _: u8) { crate::a::f() }\n",
        ),
        ("crates/k/tests/main.rs", "// Words.\n\n// Words.\n"),
    ]);
    let page = page(&sources, 7);
    let rows = [
        "| `k` | 3 | 6 | 50.0 % | 0 | 2 | 2 |",
        "| functions with more than four parameters | 1 | `k` 1 |",
        "| the same, counting the parts of tuples | 2 | `k` 2 |",
        "| files with `kv_b_proj` in their code | 1 | `k/a.rs` |",
        "| bytes of the root README | 7 |",
        "- `k`, 2 files: `a`, `b`",
    ];
    for row in rows {
        assert!(page.contains(row), "{row} is not in\n{page}");
    }
}
