//! The crates' sources as syntax, without what only tests see.

use std::collections::BTreeMap;

use super::code::{blank, n_shipped_lines, test_items, without_comments, without_literals};
use super::{read, sources};

/// Paths from the root and what lies there: the repository's, or a tree that a test makes up.
pub(super) type Sources = BTreeMap<String, String>;

/// A crate's files, the root first, each after the one that declares it.
pub(super) struct Crate {
    /// The name of the crate's folder.
    pub(super) name: String,
    pub(super) files: Vec<File>,
}

pub(super) struct File {
    /// From the repository's root.
    pub(super) path: String,
    /// Names of modules on the way from the crate's root, which has none.
    pub(super) module: Vec<String>,
    /// With spaces in place of tests.
    pub(super) text: String,
    /// Without those of tests.
    pub(super) n_lines: usize,
    pub(super) syntax: syn::File,
}

impl Crate {
    /// Follows `mod` from the root of the crate in `crates/<name>/src`, so that files of tests are not reached.
    pub(super) fn parse(name: &str, sources: &Sources) -> Self {
        let folder = format!("crates/{name}/src/");
        let root = ["lib.rs", "main.rs"].map(|file| format!("{folder}{file}"));
        let root = root
            .into_iter()
            .find(|path| sources.contains_key(path))
            .unwrap_or_else(|| panic!("{folder}: has neither lib.rs nor main.rs"));
        let mut files = vec![File::parse(root, Vec::new(), sources)];
        let mut next = 0;
        while let Some(file) = files.get(next) {
            let children = file.children();
            let found = children
                .into_iter()
                .map(|(module, candidates)| child(file, module, &candidates, sources));
            let found: Vec<_> = found.collect();
            files.extend(found);
            next += 1;
        }
        Self {
            name: name.to_owned(),
            files,
        }
    }
}

fn child(parent: &File, module: Vec<String>, candidates: &[String; 2], sources: &Sources) -> File {
    let path = candidates.iter().find(|path| sources.contains_key(*path));
    let path = path.unwrap_or_else(|| panic!("{}: has no file for {module:?}", parent.path));
    File::parse(path.clone(), module, sources)
}

impl File {
    fn parse(path: String, module: Vec<String>, sources: &Sources) -> Self {
        let text = without_tests(&sources[&path]);
        let syntax = syn::parse_file(&text).unwrap_or_else(|e| panic!("{path}: {e}"));
        Self {
            n_lines: n_shipped_lines(&sources[&path]),
            path,
            module,
            text,
            syntax,
        }
    }

    /// The last part of the path.
    pub(super) fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// The text with spaces in place of comments; strings stay.
    pub(super) fn code(&self) -> String {
        without_comments(&self.text)
    }

    /// Modules in files of their own that this file declares, and where their files may lie.
    fn children(&self) -> Vec<(Vec<String>, [String; 2])> {
        let stem = self.path.trim_end_matches(".rs");
        let folder = ["/lib", "/main", "/mod"]
            .iter()
            .find_map(|name| stem.strip_suffix(name))
            .unwrap_or(stem);
        let mut children = Vec::new();
        declared(&self.syntax.items, &mut Vec::new(), &mut |inner| {
            let path = format!("{folder}/{}", inner.join("/"));
            let module = [self.module.as_slice(), inner].concat();
            children.push((module, [format!("{path}.rs"), format!("{path}/mod.rs")]));
        });
        children
    }
}

/// Hands `found` the modules that `items` declare without a body, by their names from the file's own module on.
fn declared(items: &[syn::Item], outer: &mut Vec<String>, found: &mut dyn FnMut(&[String])) {
    let modules = items.iter().filter_map(|item| match item {
        syn::Item::Mod(module) => Some(module),
        _ => None,
    });
    for module in modules {
        outer.push(module.ident.to_string());
        match &module.content {
            Some((_, items)) => declared(items, outer, found),
            None => found(outer),
        }
        outer.pop();
    }
}

/// A source file with spaces in place of the items that only tests see.
pub(super) fn without_tests(text: &str) -> String {
    let mut shipped = text.to_owned();
    for item in test_items(&without_literals(text)) {
        let start = with_attributes(text, item.start);
        let blanked = blank(&text[start..item.end]);
        shipped.replace_range(start..item.end, &blanked);
    }
    shipped
}

/// Where the documentation and attributes in the lines before `start` begin.
fn with_attributes(text: &str, start: usize) -> usize {
    let mut start = start;
    loop {
        let line_start = text[..start].rfind('\n').map_or(0, |end| end + 1);
        let Some(before) = text[..line_start].strip_suffix('\n') else {
            return start;
        };
        let line = before.rsplit('\n').next().unwrap_or_default().trim_start();
        if !line.starts_with("///") && !line.starts_with("#[") {
            return start;
        }
        start = before.len() - line.len();
    }
}

/// The repository's own Rust files.
pub(super) fn repository() -> Sources {
    let texts = sources().into_iter().map(|path| {
        let text = read(&path);
        (path, text)
    });
    texts.collect()
}

/// The crates whose sources are in `crates`, in the order of their names.
pub(super) fn crates(sources: &Sources) -> Vec<Crate> {
    let roots = sources.keys().filter_map(|path| {
        let (name, file) = path.strip_prefix("crates/")?.split_once("/src/")?;
        ["lib.rs", "main.rs"].contains(&file).then_some(name)
    });
    roots.map(|name| Crate::parse(name, sources)).collect()
}

/// A tree that a test makes up.
pub(super) fn made_up(files: &[(&str, &str)]) -> Sources {
    let file = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
    files.iter().map(file).collect()
}

#[test]
fn files_are_found_by_their_declarations_and_tests_are_left_out() {
    let sources = made_up(&[
        (
            "crates/a/src/lib.rs",
            "mod b;\nmod c { mod d; }\n#[cfg(test)]\nmod tests;",
        ),
        (
            "crates/a/src/b/mod.rs",
            "mod e;\nfn kept() {}\n/// Words.\n#[expect(x)]\n#[cfg(test)]\nfn tested() {}\n",
        ),
        ("crates/a/src/b/e.rs", "mod f;"),
        ("crates/a/src/b/e/f.rs", ""),
        ("crates/a/src/c/d.rs", ""),
        ("crates/a/src/tests.rs", "this is not Rust"),
        ("crates/a/tests/main.rs", "neither is this"),
    ]);
    let [a] = crates(&sources).try_into().ok().expect("one crate");
    let files: Vec<_> = a
        .files
        .iter()
        .map(|file| (file.path.as_str(), file.module.join("::")))
        .collect();
    let expected = [
        ("crates/a/src/lib.rs", ""),
        ("crates/a/src/b/mod.rs", "b"),
        ("crates/a/src/c/d.rs", "c::d"),
        ("crates/a/src/b/e.rs", "b::e"),
        ("crates/a/src/b/e/f.rs", "b::e::f"),
    ];
    assert_eq!(
        files,
        expected.map(|(path, module)| (path, module.to_owned()))
    );
    let b = &a.files[1].text;
    assert!(
        b.contains("kept")
            && !b.contains("tested")
            && !b.contains("Words")
            && !b.contains("expect")
    );
    assert_eq!(b.lines().count(), 6);
}
