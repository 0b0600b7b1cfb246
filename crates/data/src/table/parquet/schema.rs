//! The columns of a Parquet file: a tree of fields, with the levels at which each is present.
//!
//! Source: apache/parquet-format: LogicalTypes.md, with its rules for lists of older writers.

use super::thrift::Thrift;
use crate::file::UnreadColumn;
use std::ops::Range;

const MAX_DEPTH: u32 = 64;
const MAX_COLUMNS: usize = 10_000;

/// How values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Physical {
    Bool,
    Int32,
    Int64,
    Float,
    Double,
    Bytes,
}

impl Physical {
    /// Bytes of a value, if all have as many.
    pub(super) fn size(self) -> Option<usize> {
        match self {
            Self::Int32 | Self::Float => Some(4),
            Self::Int64 | Self::Double => Some(8),
            Self::Bool | Self::Bytes => None,
        }
    }
}

/// A column of values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) name: String,
    /// What its values are; otherwise a word for what has no form in a row.
    pub(super) physical: Result<Physical, &'static str>,
    /// Whether its integers have no sign.
    pub(super) is_unsigned: bool,
    /// The levels of a value that is not null.
    pub(super) max_def: u32,
    pub(super) max_rep: u32,
}

/// A field of a row or of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ParquetField {
    pub(super) name: String,
    pub(super) node: Node,
    /// The definition level from which on it is not null.
    pub(super) def: u32,
    /// Its columns.
    pub(super) leaves: Range<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Value,
    Object(Vec<ParquetField>),
    List(Repeated),
    /// Lists of keys and values.
    Map(Repeated),
}

/// The elements of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Repeated {
    pub(super) element: Box<ParquetField>,
    /// The definition level from which on there is an element.
    pub(super) def: u32,
    /// The repetition level of all elements but the first.
    pub(super) rep: u32,
}

/// All columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schema {
    pub(super) fields: Vec<ParquetField>,
    pub(super) leaves: Vec<Leaf>,
    pub(super) unread: Vec<UnreadColumn>,
}

impl Schema {
    /// From the elements of the metadata, parents before children. None if they are malformed.
    pub(super) fn new(elements: &[Thrift]) -> Option<Self> {
        let (root, rest) = elements.split_first()?;
        let mut builder = SchemaBuilder {
            elements: rest,
            leaves: Vec::new(),
        };
        let n = usize::try_from(root.size(5).unwrap_or(0)).ok()?;
        let mut schema = Self {
            fields: Vec::new(),
            leaves: Vec::new(),
            unread: Vec::new(),
        };
        for field in builder.fields(n, MaxLevels::default())? {
            let mut leaves = builder.leaves[field.leaves.clone()].iter();
            match leaves.find_map(|leaf| leaf.physical.err()) {
                Some(found) => schema.unread.push(UnreadColumn {
                    name: field.name,
                    found: found.to_owned(),
                }),
                None => schema.fields.push(field),
            }
        }
        schema.leaves = builder.leaves;
        Some(schema)
    }
}

/// The levels above a field.
#[derive(Clone, Copy, Default)]
struct MaxLevels {
    def: u32,
    rep: u32,
    depth: u32,
}

struct SchemaBuilder<'a> {
    elements: &'a [Thrift],
    leaves: Vec<Leaf>,
}

impl<'a> SchemaBuilder<'a> {
    fn fields(&mut self, n: usize, above: MaxLevels) -> Option<Vec<ParquetField>> {
        if n > self.elements.len() {
            return None;
        }
        (0..n).map(|_| self.field(above)).collect()
    }

    /// The next element, with what repeats it.
    fn field(&mut self, above: MaxLevels) -> Option<ParquetField> {
        let (element, rest) = self.elements.split_first()?;
        self.elements = rest;
        let mut levels = MaxLevels {
            depth: above.depth + 1,
            ..above
        };
        match element.number(3) {
            Some(1) => levels.def += 1,
            Some(2) => return self.repeated(element, above),
            _ => {}
        }
        self.node(element, levels)
    }

    /// A repeated element outside of a list: it is a list that cannot be null.
    fn repeated(&mut self, element: &'a Thrift, above: MaxLevels) -> Option<ParquetField> {
        let levels = MaxLevels {
            def: above.def + 1,
            rep: above.rep + 1,
            depth: above.depth + 1,
        };
        let inner = self.node(element, levels)?;
        Some(ParquetField {
            name: inner.name.clone(),
            def: above.def,
            leaves: inner.leaves.clone(),
            node: Node::List(Repeated {
                element: Box::new(inner),
                def: levels.def,
                rep: levels.rep,
            }),
        })
    }

    /// A field whose own levels are counted.
    fn node(&mut self, element: &'a Thrift, levels: MaxLevels) -> Option<ParquetField> {
        let name = element.text(4)?.to_owned();
        if levels.depth > MAX_DEPTH || self.leaves.len() >= MAX_COLUMNS {
            return None;
        }
        let first = self.leaves.len();
        let logical = element.field(10);
        let is_a = |converted: &[i64], id: i16| {
            element
                .number(6)
                .is_some_and(|number| converted.contains(&number))
                || logical.is_some_and(|logical| logical.field(id).is_some())
        };
        let node = match element.size(5) {
            None | Some(0) => {
                self.leaves.push(leaf(element, &name, levels)?);
                Node::Value
            }
            Some(1) if is_a(&[3], 3) => Node::List(self.elements_of(&name, levels)?),
            Some(1) if is_a(&[1, 2], 2) => Node::Map(self.elements_of("", levels)?),
            Some(n) => Node::Object(self.fields(usize::try_from(n).ok()?, levels)?),
        };
        Some(ParquetField {
            name,
            node,
            def: levels.def,
            leaves: first..self.leaves.len(),
        })
    }

    /// The repeated element in an annotated list.
    fn elements_of(&mut self, list: &str, above: MaxLevels) -> Option<Repeated> {
        let (element, rest) = self.elements.split_first()?;
        let (name, children) = (element.text(4)?, element.size(5).unwrap_or(0));
        if element.number(3) != Some(2) {
            return None;
        }
        self.elements = rest;
        let levels = MaxLevels {
            def: above.def + 1,
            rep: above.rep + 1,
            depth: above.depth + 1,
        };
        // The group around the element has no meaning of its own, except in files of some older writers.
        let is_element = children != 1 || name == "array" || name == format!("{list}_tuple");
        let inner = match is_element {
            true => self.node(element, levels)?,
            false => self.field(levels)?,
        };
        Some(Repeated {
            element: Box::new(inner),
            def: levels.def,
            rep: levels.rep,
        })
    }
}

fn leaf(element: &Thrift, name: &str, levels: MaxLevels) -> Option<Leaf> {
    let converted = element.number(6);
    let logical = match element.field(10) {
        Some(Thrift::Struct(fields)) => fields.first(),
        _ => None,
    };
    let logical_id = logical.map(|(id, _)| *id);
    let is_unsigned = matches!(converted, Some(11..=14))
        || logical.is_some_and(|(id, integer)| {
            *id == 10 && integer.field(2) == Some(&Thrift::Bool(false))
        });
    let physical = match (element.number(1)?, logical_id, converted) {
        (_, Some(5), _) | (_, _, Some(5)) => Err("decimal numbers"),
        (_, Some(6), _) | (_, _, Some(6)) => Err("dates"),
        (_, Some(7), _) | (_, _, Some(7 | 8)) => Err("times"),
        (_, Some(8), _) | (_, _, Some(9 | 10)) | (3, _, _) => Err("timestamps"),
        (0, _, _) => Ok(Physical::Bool),
        (1, _, _) => Ok(Physical::Int32),
        (2, _, _) => Ok(Physical::Int64),
        (4, _, _) => Ok(Physical::Float),
        (5, _, _) => Ok(Physical::Double),
        // Text, enumerations and JSON.
        (6, Some(1 | 4 | 12), _) | (6, _, Some(0 | 4 | 19)) => Ok(Physical::Bytes),
        (6 | 7, _, _) => Err("bytes"),
        _ => return None,
    };
    Some(Leaf {
        name: name.to_owned(),
        physical,
        is_unsigned,
        max_def: levels.def,
        max_rep: levels.rep,
    })
}
