use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{ROOT, bytes, files, folder, has, read, report, report_except, sources, text};

/// Names that say nothing, for a file or a folder of source.
const VAGUE_NAMES: [&str; 7] = [
    "utils", "common", "helpers", "misc", "types", "manager", "base",
];
/// Files directly in one folder of a crate.
const MOST_FILES: usize = 20;
const READMES: [&str; 5] = [
    "README.md",
    "crates/README.md",
    "recipes/README.md",
    "datasets/README.md",
    "tests/README.md",
];
/// Bytes of the page that a visitor meets first.
const LONGEST_FRONT_PAGE: usize = 8_192;
/// Points of a crate in `crates/README.md`.
const MOST_POINTS: usize = 8;
/// Pages, and crates in `crates/README.md`, that are longer.
const LONG_PAGES: &[(&str, &str)] = &[];
/// In bytes, except for the model that the quickstart starts from.
const LARGEST_FILE: usize = 5_000_000;
const SHIPPED_MODEL: &str = "recipes/quickstart/base/";
/// In bytes, all data sets together.
const LARGEST_DATASETS: usize = 6_000_000;
/// Each in two parts, so that this file does not find itself.
const REGISTRIES: [[&str; 2]; 5] = [
    ["crates", ".io"],
    ["pypi", ".org"],
    ["pythonhosted", ".org"],
    ["npmjs", ".org"],
    ["npmjs", ".com"],
];
/// Where the paths of one machine start.
const HOMES: [[&str; 2]; 4] = [
    ["/", "home/"],
    ["/", "root/"],
    ["/", "work/"],
    ["/", "Users/"],
];

#[test]
fn files_are_named_by_what_they_hold() {
    let is_vague = |part: &str| VAGUE_NAMES.contains(&part.trim_end_matches(".rs"));
    let vague = sources()
        .into_iter()
        .filter(|path| path.split('/').any(is_vague));
    let findings: Vec<_> = vague
        .map(|path| format!("{path}: a name for anything; name it by its one noun"))
        .collect();
    report(&findings);
}

#[test]
fn folders_hold_few_files() {
    let mut counts = BTreeMap::<String, usize>::new();
    for path in files().iter().filter(|path| path.starts_with("crates/")) {
        *counts.entry(folder(path).to_owned()).or_default() += 1;
    }
    let full = counts.iter().filter(|(_, count)| **count > MOST_FILES);
    let finding = |(folder, count)| {
        format!("{folder}: {count} files, at most {MOST_FILES}; make a folder of some")
    };
    report(&full.map(finding).collect::<Vec<_>>());
}

#[test]
fn folders_have_readmes() {
    let files = files();
    let lacking = READMES
        .iter()
        .filter(|readme| !files.iter().any(|path| path == *readme));
    report(
        &lacking
            .map(|readme| format!("{readme}: is missing; say what the folder is for"))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn pages_are_read_at_one_sitting() {
    let mut findings = Vec::new();
    let size = bytes("README.md").len();
    if size > LONGEST_FRONT_PAGE {
        let finding = format!(
            "README.md: {size} bytes, at most {LONGEST_FRONT_PAGE}; move figures and details to the pages of their folders"
        );
        findings.push(("README.md".to_owned(), finding));
    }
    for (name, count) in points_of_crates(&read("crates/README.md")) {
        if count > MOST_POINTS {
            let finding = format!(
                "crates/README.md: {count} points on `{name}`, at most {MOST_POINTS}; move what concerns one file there"
            );
            findings.push((name, finding));
        }
    }
    report_except(&findings, LONG_PAGES, "LONG_PAGES");
}

#[test]
fn points_are_counted_by_crate() {
    let page = "## A\n- no\n## The crates\n\n### k\nWords.\n- one\n  more of it\n- two\n\n### l\n- one\n\n## B\n- no\n";
    assert_eq!(
        points_of_crates(page),
        [("k".to_owned(), 2), ("l".to_owned(), 1)]
    );
}

#[test]
fn recipes_and_data_sets_are_listed() {
    let mut findings = Vec::new();
    for parent in ["recipes/", "datasets/"] {
        let readme = read(&format!("{parent}README.md"));
        for name in children(parent).iter().filter(|name| !has(&readme, name)) {
            findings.push(format!(
                "{parent}README.md: does not name `{name}`; add a line on it"
            ));
        }
    }
    report(&findings);
}

#[test]
fn repository_is_small() {
    let sizes: Vec<_> = files()
        .into_iter()
        .map(|path| (bytes(&path).len(), path))
        .collect();
    let large = sizes
        .iter()
        .filter(|(size, path)| *size > LARGEST_FILE && !path.starts_with(SHIPPED_MODEL));
    let finding = |(size, path): &_| {
        format!("{path}: {size} bytes, at most {LARGEST_FILE}; shrink it, or make it on demand")
    };
    let mut findings: Vec<_> = large.map(finding).collect();
    let datasets: usize = sizes
        .iter()
        .filter(|(_, path)| path.starts_with("datasets/"))
        .map(|(size, _)| size)
        .sum();
    if datasets >= LARGEST_DATASETS {
        findings.push(format!(
            "datasets/: {datasets} bytes, fewer than {LARGEST_DATASETS} allowed; drop rows"
        ));
    }
    report(&findings);
}

#[test]
fn text_names_no_registry_and_no_machine() {
    let [registries, homes] = [
        REGISTRIES.map(|parts| parts.concat()).to_vec(),
        HOMES.map(|parts| parts.concat()).to_vec(),
    ];
    let mut findings = Vec::new();
    // Cargo writes the registry into the lock file.
    for path in files()
        .into_iter()
        .filter(|path| !path.ends_with("Cargo.lock"))
    {
        for (line_idx, line) in text(&path).unwrap_or_default().lines().enumerate() {
            let place = format!("{path}:{}", line_idx + 1);
            for registry in registries
                .iter()
                .filter(|registry| line.contains(*registry))
            {
                findings.push(format!(
                    "{place}: names the host {registry}; name the package and its version"
                ));
            }
            for home in homes.iter().filter(|home| has_absolute(line, home)) {
                findings.push(format!(
                    "{place}: {home} is on one machine; write paths from the repository's root"
                ));
            }
        }
    }
    report(&findings);
}

#[test]
fn links_lead_somewhere() {
    let mut findings = Vec::new();
    for path in files()
        .iter()
        .filter(|path| path.rsplit('/').next() == Some("README.md"))
    {
        for link in links(&read(path)) {
            if !Path::new(ROOT).join(folder(path)).join(&link).exists() {
                findings.push(format!(
                    "{path}: links to {link}, which is not there; correct the link"
                ));
            }
        }
    }
    report(&findings);
}

/// How many points the architecture page has on each crate.
fn points_of_crates(page: &str) -> Vec<(String, usize)> {
    let chapter = page
        .split_once("\n## The crates\n")
        .map_or("", |(_, chapter)| chapter);
    let chapter = chapter.split("\n## ").next().unwrap_or_default();
    let count = |section: &str| {
        let points = section.lines().filter(|line| line.starts_with("- "));
        (
            section.lines().next().unwrap_or_default().to_owned(),
            points.count(),
        )
    };
    chapter.split("\n### ").skip(1).map(count).collect()
}

/// The folders and recipes directly in a folder.
fn children(parent: &str) -> BTreeSet<String> {
    let files = files();
    let inner = files.iter().filter_map(|path| path.strip_prefix(parent));
    let names = inner.filter_map(|path| match path.split_once('/') {
        Some((folder, _)) => Some(folder),
        None => path.ends_with(".toml").then_some(path),
    });
    names.map(str::to_owned).collect()
}

/// The files that a Markdown page links to, without anchors and titles.
fn links(page: &str) -> Vec<String> {
    let prose = page.split("```").step_by(2);
    let targets = prose
        .flat_map(|prose| prose.split("](").skip(1))
        .filter_map(|rest| rest.split(')').next());
    let files = targets.filter_map(|target| target.split(['#', ' ']).next());
    files
        .filter(|file| !file.is_empty() && !file.contains(':'))
        .map(str::to_owned)
        .collect()
}

/// Whether a line has a path that starts with `home`, and not only one with `home` in its middle.
fn has_absolute(line: &str, home: &str) -> bool {
    let is_inner = |c: char| c.is_alphanumeric() || "._-~}".contains(c);
    line.match_indices(home)
        .any(|(start, _)| !line[..start].ends_with(is_inner))
}
