//! Which file of a crate names which: from its imports and the paths in its code to the files that define the names.

use std::collections::{BTreeMap, BTreeSet};

use super::paths::{Origin, Paths};
use super::tree::Crate;

/// Renamings of renamings that are followed.
const MOST_HOPS: usize = 16;

/// A file names something that another file of its crate defines.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Edge {
    /// Indices of the crate's files.
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) line: usize,
    /// As it is written, from the crate's root on.
    pub(super) path: String,
    /// The path names what the crate's root only hands on, and not the room that has it.
    pub(super) through_root: bool,
}

/// Whether a name that a file only hands on (`pub use`) is an edge.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reexports {
    Counted,
    /// A page of contents depends on nothing that is in it.
    LeftOut,
}

/// Every edge of a crate, in the order of its files and lines.
///
/// An import leads to the file that defines the name, through whatever hands it on. Methods leave no edge; their
/// types do.
pub(super) fn edges(source: &Crate, reexports: Reexports) -> Vec<Edge> {
    let map = Map::of(source);
    let mut edges = BTreeSet::new();
    for (from, paths) in map.paths.iter().enumerate() {
        for written in &paths.written {
            let is_used = match &written.origin {
                Origin::Code | Origin::Import => true,
                Origin::Reexport(name) => {
                    reexports == Reexports::Counted || paths.names.contains(name)
                }
            };
            let Some(path) = map.absolute(&written.module, &written.path, 0) else {
                continue;
            };
            let target = map.target(&path, 0);
            let defined = target.filter(|target| is_used && target.is_item && target.file != from);
            edges.extend(defined.map(|target| Edge {
                from,
                to: target.file,
                line: written.line,
                through_root: written.is_absolute() && map.is_through_root(&path),
                path: path.join("::"),
            }));
        }
    }
    edges.into_iter().collect()
}

struct Map {
    /// By file.
    paths: Vec<Paths>,
    /// The file of each module, those in braces too.
    modules: BTreeMap<Vec<String>, usize>,
}

struct Target {
    file: usize,
    /// And not a module.
    is_item: bool,
}

impl Map {
    fn of(source: &Crate) -> Self {
        let paths: Vec<_> = source.files.iter().map(Paths::of).collect();
        let mut modules = BTreeMap::new();
        for (file_idx, (file, paths)) in source.files.iter().zip(&paths).enumerate() {
            modules.insert(file.module.clone(), file_idx);
            modules.extend(
                paths
                    .modules
                    .iter()
                    .map(|module| (module.clone(), file_idx)),
            );
        }
        Self { paths, modules }
    }

    /// A path from the crate's root on, of one that is written in `module`; none if it leaves the crate.
    fn absolute(&self, module: &[String], path: &[String], hops: usize) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        let base = match first.as_str() {
            "crate" => Vec::new(),
            "self" => module.to_vec(),
            "super" => {
                let mut base = module.to_vec();
                base.pop()?;
                // Another `super` goes on from there.
                if rest.first().is_some_and(|next| next == "super") {
                    return self.absolute(&base, rest, hops);
                }
                base
            }
            _ if self.modules.contains_key(&[module, &path[..1]].concat()) => {
                return Some([module, path].concat());
            }
            _ => self.imported(module, first, hops)?,
        };
        Some([base.as_slice(), rest].concat())
    }

    /// What an import in `module` has given a name to.
    fn imported(&self, module: &[String], name: &str, hops: usize) -> Option<Vec<String>> {
        let bindings = &self.paths[*self.modules.get(module)?].bindings;
        let path = bindings.get(&(module.to_vec(), name.to_owned()))?;
        // `use a::b` may name a crate `a`, or a module of it, but not itself.
        let is_itself = path.first().is_some_and(|first| first == name);
        (hops < MOST_HOPS && !is_itself).then(|| self.absolute(module, path, hops + 1))?
    }

    /// The file that defines what a path from the root on leads to.
    fn target(&self, path: &[String], hops: usize) -> Option<Target> {
        let mut module = Vec::new();
        for (at, name) in path.iter().enumerate() {
            module.push(name.clone());
            if self.modules.contains_key(&module) {
                continue;
            }
            module.pop();
            if let Some(target) = self.handed_on(&module, &path[at..], hops) {
                return Some(target);
            }
            let file = *self.modules.get(&module)?;
            return Some(Target {
                file,
                is_item: true,
            });
        }
        let file = *self.modules.get(&module)?;
        Some(Target {
            file,
            is_item: false,
        })
    }

    /// The same of a path that begins with a name that `module` has imported.
    fn handed_on(&self, module: &[String], path: &[String], hops: usize) -> Option<Target> {
        let (name, rest) = path.split_first()?;
        if hops == MOST_HOPS {
            return None;
        }
        let paths = &self.paths[*self.modules.get(module)?];
        if let Some(base) = self.imported(module, name, hops) {
            return self.target(&[base.as_slice(), rest].concat(), hops + 1);
        }
        let is_defined = paths.definitions.contains(&(module.to_vec(), name.clone()));
        let globs = paths
            .globs
            .iter()
            .filter(|glob| !is_defined && glob.module == module);
        let mut bases = globs.filter_map(|glob| self.absolute(module, &glob.path, hops + 1));
        bases.find_map(|base| self.defined(&base, path, hops + 1))
    }

    /// What `path` leads to in `module`, if the module has its first name.
    fn defined(&self, module: &[String], path: &[String], hops: usize) -> Option<Target> {
        let paths = &self.paths[*self.modules.get(module)?];
        let key = (module.to_vec(), path.first()?.clone());
        let has = paths.definitions.contains(&key)
            || paths.bindings.contains_key(&key)
            || self.modules.contains_key(&[module, &path[..1]].concat());
        has.then(|| self.target(&[module, path].concat(), hops))?
    }

    fn is_through_root(&self, path: &[String]) -> bool {
        let [name, ..] = path else { return false };
        let key = (Vec::new(), name.clone());
        !self.modules.contains_key(&path[..1]) && self.paths[0].bindings.contains_key(&key)
    }
}
