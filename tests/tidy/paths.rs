//! The paths that a file writes: its imports, and those in its code, macros included.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Ident, TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::tree::File;

/// A path as it is written.
pub(super) struct Written {
    /// The module it is written in.
    pub(super) module: Vec<String>,
    pub(super) path: Vec<String>,
    pub(super) line: usize,
    pub(super) origin: Origin,
}

impl Written {
    /// Whether it says where it begins, and does not go on from an import.
    pub(super) fn is_absolute(&self) -> bool {
        let first = self.path.first().map(String::as_str);
        matches!(first, Some("crate" | "self" | "super"))
    }
}

pub(super) enum Origin {
    Code,
    Import,
    /// An import that others see under this name.
    Reexport(String),
}

/// A module's name for something, by module.
type Name = (Vec<String>, String);

#[derive(Default)]
pub(super) struct Paths {
    pub(super) written: Vec<Written>,
    /// Modules in braces.
    pub(super) modules: BTreeSet<Vec<String>>,
    /// What imports give names to.
    pub(super) bindings: BTreeMap<Name, Vec<String>>,
    /// Imports of everything.
    pub(super) globs: Vec<Written>,
    pub(super) definitions: BTreeSet<Name>,
    /// The names that paths in the code begin with.
    pub(super) names: BTreeSet<String>,
    /// The module that is being read.
    module: Vec<String>,
}

impl Paths {
    pub(super) fn of(file: &File) -> Self {
        let mut paths = Self {
            module: file.module.clone(),
            ..Self::default()
        };
        paths.visit_file(&file.syntax);
        paths
    }

    fn write(&mut self, path: &[Ident], origin: Origin) {
        let Some(first) = path.first() else { return };
        self.written.push(Written {
            module: self.module.clone(),
            path: path.iter().map(Ident::to_string).collect(),
            line: first.span().start().line,
            origin,
        });
    }

    /// The imports of one `use`, of which `outer` is read already.
    fn import(&mut self, tree: &syn::UseTree, outer: &[Ident], is_reexport: bool) {
        let join = |last: &Ident| [outer, std::slice::from_ref(last)].concat();
        match tree {
            syn::UseTree::Path(path) => self.import(&path.tree, &join(&path.ident), is_reexport),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.import(tree, outer, is_reexport);
                }
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                let name = outer.last().map(Ident::to_string).unwrap_or_default();
                self.bind(outer, name, is_reexport);
            }
            syn::UseTree::Name(name) => {
                self.bind(&join(&name.ident), name.ident.to_string(), is_reexport);
            }
            syn::UseTree::Rename(rename) => {
                let path = if rename.ident == "self" {
                    outer.to_vec()
                } else {
                    join(&rename.ident)
                };
                self.bind(&path, rename.rename.to_string(), is_reexport);
            }
            syn::UseTree::Glob(_) => {
                self.write(outer, Origin::Import);
                self.globs.extend(self.written.pop());
            }
        }
    }

    fn bind(&mut self, path: &[Ident], name: String, is_reexport: bool) {
        let origin = if is_reexport {
            Origin::Reexport(name.clone())
        } else {
            Origin::Import
        };
        self.write(path, origin);
        let path = path.iter().map(Ident::to_string).collect();
        self.bindings.insert((self.module.clone(), name), path);
    }

    /// Takes note of a path in code, and of the name it begins with.
    fn mention(&mut self, path: &[Ident]) {
        self.names.extend(path.first().map(Ident::to_string));
        if path.len() > 1 {
            self.write(path, Origin::Code);
        }
    }

    /// Finds paths in what a macro or an attribute is given.
    fn scan(&mut self, tokens: TokenStream) {
        let mut path: Vec<Ident> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.mention(&std::mem::take(&mut path));
                    }
                    path.push(ident);
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => {
                    self.scan(group.stream());
                    colons = 0;
                }
                _ => colons = 0,
            }
        }
        self.mention(&path);
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        self.module.push(module.ident.to_string());
        if module.content.is_some() {
            self.modules.insert(self.module.clone());
        }
        visit::visit_item_mod(self, module);
        self.module.pop();
    }

    fn visit_item_use(&mut self, import: &'ast syn::ItemUse) {
        // `::name` is another crate.
        if import.leading_colon.is_none() {
            let is_reexport = !matches!(import.vis, syn::Visibility::Inherited);
            self.import(&import.tree, &[], is_reexport);
        }
    }

    fn visit_item(&mut self, item: &'ast syn::Item) {
        if let Some(name) = name(item) {
            self.definitions
                .insert((self.module.clone(), name.to_string()));
        }
        visit::visit_item(self, item);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let names: Vec<_> = path
                .segments
                .iter()
                .map(|part| part.ident.clone())
                .collect();
            self.mention(&names);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        visit::visit_macro(self, call);
        self.scan(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.scan(list.tokens.clone());
        }
    }

    /// `pub(in path)` names where something is seen, and depends on nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}

fn name(item: &syn::Item) -> Option<&Ident> {
    Some(match item {
        syn::Item::Const(item) => &item.ident,
        syn::Item::Enum(item) => &item.ident,
        syn::Item::Fn(item) => &item.sig.ident,
        syn::Item::Static(item) => &item.ident,
        syn::Item::Struct(item) => &item.ident,
        syn::Item::Trait(item) => &item.ident,
        syn::Item::Type(item) => &item.ident,
        syn::Item::Union(item) => &item.ident,
        syn::Item::Macro(item) => item.ident.as_ref()?,
        _ => return None,
    })
}
