//! What files define: functions and their parameters, types, constants.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// A name and the line it is defined in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) line: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Signature {
    pub(super) function: Named,
    /// By the trait that is implemented.
    pub(super) is_prescribed: bool,
    /// Without `self`.
    pub(super) n_parameters: usize,
    /// The same, a tuple pattern counted as its parts.
    pub(super) n_parts: usize,
    /// Parts of the widest tuple pattern; 0 without one.
    pub(super) widest_tuple: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Constant {
    pub(super) constant: Named,
    /// As it is written, on one line.
    pub(super) value: String,
}

/// What a file defines, in methods and functions too.
#[derive(Default)]
pub(super) struct Items {
    pub(super) signatures: Vec<Signature>,
    /// Structs, enums, unions, traits and aliases; types of an `impl` belong to their trait.
    pub(super) types: Vec<Named>,
    /// Those of modules: what a function or an `impl` has for itself is read where it is used.
    pub(super) constants: Vec<Constant>,
    is_in_trait_impl: bool,
    is_in_body: bool,
}

impl Items {
    pub(super) fn of(syntax: &syn::File) -> Self {
        let mut items = Self::default();
        items.visit_file(syntax);
        items
    }
}

impl<'ast> Visit<'ast> for Items {
    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        let patterns = signature.inputs.iter().filter_map(|input| match input {
            syn::FnArg::Typed(input) => Some(&*input.pat),
            syn::FnArg::Receiver(_) => None,
        });
        let patterns: Vec<_> = patterns.collect();
        let widest = patterns.iter().map(|pattern| widest_tuple(pattern)).max();
        self.signatures.push(Signature {
            function: named(&signature.ident),
            is_prescribed: self.is_in_trait_impl,
            n_parameters: patterns.len(),
            n_parts: patterns.iter().map(|pattern| n_parts(pattern)).sum(),
            widest_tuple: widest.unwrap_or(0),
        });
        visit::visit_signature(self, signature);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let outer = std::mem::replace(&mut self.is_in_trait_impl, item.trait_.is_some());
        visit::visit_item_impl(self, item);
        self.is_in_trait_impl = outer;
    }

    fn visit_block(&mut self, block: &'ast syn::Block) {
        let outer = std::mem::replace(&mut self.is_in_body, true);
        visit::visit_block(self, block);
        self.is_in_body = outer;
    }

    fn visit_item(&mut self, item: &'ast syn::Item) {
        let ident = match item {
            syn::Item::Enum(item) => Some(&item.ident),
            syn::Item::Struct(item) => Some(&item.ident),
            syn::Item::Trait(item) => Some(&item.ident),
            syn::Item::Type(item) => Some(&item.ident),
            syn::Item::Union(item) => Some(&item.ident),
            _ => None,
        };
        self.types.extend(ident.map(named));
        visit::visit_item(self, item);
    }

    fn visit_item_const(&mut self, constant: &'ast syn::ItemConst) {
        if constant.ident != "_" && !self.is_in_body {
            self.constants.push(Constant {
                constant: named(&constant.ident),
                value: source_text(&constant.expr),
            });
        }
        visit::visit_item_const(self, constant);
    }
}

fn named(ident: &syn::Ident) -> Named {
    Named {
        name: ident.to_string(),
        line: ident.span().start().line,
    }
}

/// What was written, with one space for any.
pub(super) fn source_text(syntax: &impl Spanned) -> String {
    let text = syntax.span().source_text().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// How many names a reader meets in a parameter's pattern.
fn n_parts(pattern: &syn::Pat) -> usize {
    match pattern {
        syn::Pat::Tuple(tuple) => tuple.elems.iter().map(n_parts).sum(),
        syn::Pat::Reference(reference) => n_parts(&reference.pat),
        _ => 1,
    }
}

fn widest_tuple(pattern: &syn::Pat) -> usize {
    match pattern {
        syn::Pat::Tuple(tuple) => {
            let inner = tuple.elems.iter().map(widest_tuple).max();
            tuple.elems.len().max(inner.unwrap_or(0))
        }
        syn::Pat::Reference(reference) => widest_tuple(&reference.pat),
        _ => 0,
    }
}

#[test]
fn parameters_are_counted_with_and_without_their_parts() {
    let text = "impl A { fn f(&self, (a, (b, c)): P, [d, e]: [u8; 2]) { fn g(_: u8) {} } }
        trait B { type T; fn h(&(a, b, c): &Q); }
        impl B for A { type T = u8; fn h(q: &Q) {} }";
    let items = Items::of(&syn::parse_file(text).expect("Rust"));
    let counts = items.signatures.iter().map(|found| {
        let counts = [found.n_parameters, found.n_parts, found.widest_tuple];
        (found.function.name.as_str(), counts, found.is_prescribed)
    });
    let expected = [
        ("f", [2, 4, 2], false),
        ("g", [1, 1, 0], false),
        ("h", [1, 3, 3], false),
        ("h", [1, 1, 0], true),
    ];
    assert_eq!(counts.collect::<Vec<_>>(), expected);
    let types: Vec<_> = items
        .types
        .iter()
        .map(|named| named.name.as_str())
        .collect();
    assert_eq!(types, ["B"]);
}

#[test]
fn constants_are_found_with_their_values() {
    let text = "const A: usize =\n    1\n    + 2;\nfn f() { const N: u8 = 1; }\nmod m { const B: &str = \"x\"; }\nimpl C { const D: u8 = 1; }\nconst _: () = ();";
    let items = Items::of(&syn::parse_file(text).expect("Rust"));
    let constants = items.constants.iter().map(|found| {
        let Named { name, line } = &found.constant;
        (name.as_str(), *line, found.value.as_str())
    });
    let expected = [("A", 1, "1 + 2"), ("B", 5, "\"x\"")];
    assert_eq!(constants.collect::<Vec<_>>(), expected);
}
