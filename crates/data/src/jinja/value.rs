//! Python's values, as far as templates meet them. All are immutable, as in Hugging Face's sandbox, except namespaces, loops and
//! iterators.

use super::budget::Budget;
use super::numbers::exact;
use super::{Error, Result};
use serde_json::Value as Json;
use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// The deepest nesting of lists and dictionaries; reading and dropping one takes a part of the stack per level.
const MAX_NESTED_VALUES: u16 = 256;
/// Dictionaries with more keys have an index.
const MAX_SCANNED_KEYS: usize = 8;

/// The fields of a namespace, in the order in which they were set.
pub(crate) type NamespaceCells = RefCell<Vec<(Arc<str>, Value)>>;

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// A name without a value, or a key or index that is not there.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    /// An integer of more than 127 bits, in decimals. It can be printed and compared only.
    Huge(Arc<str>),
    Float(f64),
    Str(Arc<str>),
    /// A text that is not escaped again.
    Markup(Arc<str>),
    Seq(Rc<Seq>),
    Dict(Rc<Dict>),
    /// What `map` and other filters give: read once, without a length.
    Iter(Rc<RefCell<VecDeque<Self>>>),
    Namespace(Rc<NamespaceCells>),
    Loop(Rc<Loop>),
    Callable(Rc<Callable>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeqKind {
    List,
    Tuple,
    /// `range(start, stop, step)`
    Range([i128; 3]),
    /// `keys()`, `values()` and `items()` of a dictionary, by their names in Python.
    View(&'static str),
}

#[derive(Debug)]
pub(crate) struct Seq {
    pub(crate) kind: SeqKind,
    pub(crate) items: Vec<Value>,
    depth: u16,
}

/// Keys and values in their order.
#[derive(Debug, Default)]
pub(crate) struct Dict {
    pub(crate) entries: Vec<(Value, Value)>,
    index: HashMap<Arc<str>, usize>,
    depth: u16,
}

/// `loop` in a loop.
#[derive(Debug)]
pub(crate) struct Loop {
    pub(crate) items: Rc<Vec<Value>>,
    pub(crate) index: Cell<usize>,
    /// The last arguments of `changed`.
    pub(crate) last: RefCell<Option<Vec<Value>>>,
}

/// What can be called.
#[derive(Debug)]
pub(crate) enum Callable {
    /// A function of the environment.
    Function(&'static str),
    Method(Value, Arc<str>),
    /// A macro by its number, and the scope in which it was defined.
    Macro(usize, usize),
    /// CallValues in turn, and the place of the next one.
    Cycler(Vec<Value>, Cell<usize>),
    /// A text for every call but the first.
    Joiner(Arc<str>, Cell<bool>),
}

impl Value {
    pub(crate) fn str(text: impl Into<Arc<str>>) -> Self {
        Self::Str(text.into())
    }

    pub(crate) fn undefined(name: impl Into<Arc<str>>) -> Self {
        Self::Undefined(name.into())
    }

    /// # Errors
    /// If it would be nested too deeply.
    pub(crate) fn seq(kind: SeqKind, items: Vec<Self>) -> Result<Self> {
        let depth = deeper(items.iter())?;
        Ok(Self::Seq(Rc::new(Seq { kind, items, depth })))
    }

    pub(crate) fn list(items: Vec<Self>) -> Result<Self> {
        Self::seq(SeqKind::List, items)
    }

    pub(crate) fn tuple(items: Vec<Self>) -> Result<Self> {
        Self::seq(SeqKind::Tuple, items)
    }

    /// Of equal keys the last counts, at the place of the first.
    pub(crate) fn dict(entries: Vec<(Self, Self)>) -> Result<Self> {
        Ok(Self::Dict(Rc::new(Dict::new(entries)?)))
    }

    pub(crate) fn iter_of(items: impl IntoIterator<Item = Self>) -> Self {
        let items = items.into_iter().collect();
        Self::Iter(Rc::new(RefCell::new(items)))
    }

    /// A value of JSON. Its nesting is that of the reader, which is bounded.
    pub(crate) fn of_json(json: &Json) -> Self {
        match json {
            Json::Null => Self::None,
            Json::Bool(flag) => Self::Bool(*flag),
            Json::Number(number) => number
                .as_i64()
                .map(i128::from)
                .or_else(|| number.as_u64().map(i128::from))
                .map_or_else(
                    || Self::Float(number.as_f64().unwrap_or(f64::NAN)),
                    Self::Int,
                ),
            Json::String(text) => Self::str(text.as_str()),
            Json::Array(list) => Self::list_of_json(list),
            Json::Object(map) => {
                if let Some(number) = exact(json) {
                    return Self::number(number);
                }
                let entries = map
                    .iter()
                    .map(|(key, value)| (Self::str(key.as_str()), Self::of_json(value)));
                Self::dict(entries.collect()).unwrap_or(Self::None)
            }
        }
    }

    pub(crate) fn list_of_json(list: &[Json]) -> Self {
        Self::list(list.iter().map(Self::of_json).collect()).unwrap_or(Self::None)
    }

    /// A number as JSON writes it.
    pub(crate) fn number(text: &str) -> Self {
        if text.contains(['.', 'e', 'E']) {
            return Self::Float(text.parse().unwrap_or(f64::NAN));
        }
        match text.parse() {
            Ok(number) => Self::Int(number),
            Err(_) => Self::Huge(integer_text(text).into()),
        }
    }

    /// Python's `bool(value)`.
    pub(crate) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(flag) => *flag,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Str(text) | Self::Markup(text) => !text.is_empty(),
            Self::Seq(seq) => !seq.items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            Self::Loop(_)
            | Self::Huge(_)
            | Self::Iter(_)
            | Self::Namespace(_)
            | Self::Callable(_) => true,
        }
    }

    /// The name of its type in Python.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::Huge(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Markup(_) => "Markup",
            Self::Seq(seq) => match seq.kind {
                SeqKind::List => "list",
                SeqKind::Tuple => "tuple",
                SeqKind::Range(_) => "range",
                SeqKind::View(name) => name,
            },
            Self::Dict(_) => "dict",
            Self::Iter(_) => "generator",
            Self::Namespace(_) => "Namespace",
            Self::Loop(_) => "LoopContext",
            Self::Callable(_) => "function",
        }
    }

    /// Its elements, as `for` reads them.
    pub(crate) fn elements(&self, budget: &Budget) -> Result<Vec<Self>> {
        let found: Vec<Self> = match self {
            Self::Undefined(_) => Vec::new(),
            Self::Str(text) | Self::Markup(text) => {
                let mut buffer = [0; 4];
                text.chars()
                    .map(|char| Self::str(&*char.encode_utf8(&mut buffer)))
                    .collect()
            }
            Self::Seq(seq) => seq.items.clone(),
            Self::Dict(dict) => dict.entries.iter().map(|(key, _)| key.clone()).collect(),
            Self::Iter(rest) => rest.borrow_mut().drain(..).collect(),
            other => {
                return Err(Error::new(format!(
                    "'{}' object is not iterable",
                    other.kind()
                )));
            }
        };
        budget.copy(found.len())?;
        Ok(found)
    }

    /// Python's `len(value)`.
    pub(crate) fn length(&self) -> Result<usize> {
        Ok(match self {
            Self::Undefined(_) => 0,
            Self::Str(text) | Self::Markup(text) => text.chars().count(),
            Self::Seq(seq) => seq.items.len(),
            Self::Dict(dict) => dict.entries.len(),
            Self::Loop(state) => state.items.len(),
            other => {
                return Err(Error::new(format!(
                    "object of type '{}' has no len()",
                    other.kind()
                )));
            }
        })
    }

    /// A whole number: an integer or a truth value.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(flag) => Some(i128::from(*flag)),
            _ => None,
        }
    }

    pub(crate) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            Self::Huge(text) => text.parse().ok(),
            other => other.as_int().map(|number| number as f64),
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) | Self::Markup(text) => Some(text),
            _ => None,
        }
    }

    fn depth(&self) -> u16 {
        match self {
            Self::Seq(seq) => seq.depth,
            Self::Dict(dict) => dict.depth,
            Self::Iter(rest) => rest.borrow().iter().map(Self::depth).max().unwrap_or(0),
            Self::Callable(callable) => match &**callable {
                Callable::Method(value, _) => value.depth() + 1,
                Callable::Cycler(values, _) => {
                    values.iter().map(Self::depth).max().unwrap_or(0) + 1
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    /// The order of two values, if Python has one.
    pub(crate) fn order(&self, other: &Self) -> Option<Ordering> {
        if let (Some(a), Some(b)) = (self.as_str(), other.as_str()) {
            return Some(a.cmp(b));
        }
        match (self, other) {
            (Self::Seq(a), Self::Seq(b)) if a.kind == b.kind => {
                let unequal = a.items.iter().zip(&b.items).find(|(a, b)| a != b);
                match unequal {
                    Some((a, b)) => a.order(b),
                    None => Some(a.items.len().cmp(&b.items.len())),
                }
            }
            (Self::Huge(a), Self::Huge(b)) => Some(huge_order(a, b)),
            (Self::Huge(a), Self::Int(_) | Self::Bool(_)) => Some(sign(a)),
            (Self::Int(_) | Self::Bool(_), Self::Huge(b)) => Some(sign(b).reverse()),
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => self.as_float()?.partial_cmp(&other.as_float()?),
            },
        }
    }
}

fn sign(huge: &str) -> Ordering {
    match huge.starts_with('-') {
        true => Ordering::Less,
        false => Ordering::Greater,
    }
}

fn huge_order(a: &str, b: &str) -> Ordering {
    let by_size = || (a.len(), a).cmp(&(b.len(), b));
    match (sign(a), sign(b)) {
        (Ordering::Less, Ordering::Less) => by_size().reverse(),
        (Ordering::Greater, Ordering::Greater) => by_size(),
        (a, b) => a.cmp(&b),
    }
}

fn deeper<'v>(items: impl Iterator<Item = &'v Value>) -> Result<u16> {
    let depth = items.map(Value::depth).max().unwrap_or(0) + 1;
    match depth > MAX_NESTED_VALUES {
        true => Err(Error::new("lists and dictionaries are nested too deeply")),
        false => Ok(depth),
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a) | Self::Markup(a), Self::Str(b) | Self::Markup(b))
            | (Self::Huge(a), Self::Huge(b)) => a == b,
            (Self::Seq(a), Self::Seq(b)) => a.kind == b.kind && a.items == b.items,
            (Self::Dict(a), Self::Dict(b)) => {
                a.entries.len() == b.entries.len()
                    && a.entries
                        .iter()
                        .all(|(key, value)| b.get(key).is_some_and(|other| other == value))
            }
            (Self::Iter(a), Self::Iter(b)) => Rc::ptr_eq(a, b),
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Loop(a), Self::Loop(b)) => Rc::ptr_eq(a, b),
            (Self::Callable(a), Self::Callable(b)) => Rc::ptr_eq(a, b),
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => matches!((self.as_float(), other.as_float()), (Some(a), Some(b)) if a == b),
            },
        }
    }
}

impl Dict {
    pub(crate) fn new(entries: Vec<(Value, Value)>) -> Result<Self> {
        let mut dict = Self {
            depth: deeper(entries.iter().flat_map(|(key, value)| [key, value]))?,
            ..Self::default()
        };
        let indexed = entries.len() > MAX_SCANNED_KEYS;
        for (key, value) in entries {
            if matches!(key, Value::Dict(_) | Value::Iter(_))
                || matches!(&key, Value::Seq(seq) if seq.kind == SeqKind::List)
            {
                return Err(Error::new(format!("unhashable type: '{}'", key.kind())));
            }
            match dict.place(&key) {
                Some(place) => dict.entries[place].1 = value,
                None => {
                    if let (true, Value::Str(name) | Value::Markup(name)) = (indexed, &key) {
                        dict.index.insert(name.clone(), dict.entries.len());
                    }
                    dict.entries.push((key, value));
                }
            }
        }
        Ok(dict)
    }

    fn place(&self, key: &Value) -> Option<usize> {
        match key {
            Value::Str(name) | Value::Markup(name) if !self.index.is_empty() => {
                self.index.get(name).copied()
            }
            key => self.entries.iter().position(|(found, _)| found == key),
        }
    }

    pub(crate) fn get(&self, key: &Value) -> Option<&Value> {
        self.place(key).map(|place| &self.entries[place].1)
    }

    pub(crate) fn get_str(&self, name: &str) -> Option<&Value> {
        if !self.index.is_empty() {
            return self.index.get(name).map(|&place| &self.entries[place].1);
        }
        let mut entries = self.entries.iter();
        let found = entries.find(|(key, _)| key.as_str() == Some(name));
        found.map(|(_, value)| value)
    }
}

/// Decimals without zeros in front.
fn integer_text(text: &str) -> String {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text),
    };
    format!("{sign}{}", digits.trim_start_matches('0'))
}
