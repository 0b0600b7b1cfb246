//! The tree of a template.

use std::sync::Arc;

/// Statements in their order.
pub(super) type Body = Vec<Stmt>;

/// A statement, and its line for messages.
#[derive(Debug)]
pub(super) struct Stmt {
    pub(super) line: u32,
    pub(super) kind: StmtKind,
}

#[derive(Debug)]
pub(super) enum StmtKind {
    Text(String),
    Emit(Expr),
    /// Conditions with what follows each, and `else`.
    If(Vec<(Expr, Body)>, Body),
    For(Box<For>),
    Set(Assigned, Expr),
    /// `{% set x | filter %}…{% endset %}`
    Capture(Assigned, Vec<Step>, Body),
    /// A macro by its number.
    Macro(usize),
    /// `{% call(x) f() %}…{% endcall %}`: the macro that `caller` is, and the call.
    Call(usize, Expr),
    /// `{% filter f %}…{% endfilter %}`
    Filter(Vec<Step>, Body),
    With(Vec<(Assigned, Expr)>, Body),
    Break,
    Continue,
}

#[derive(Debug)]
pub(super) struct For {
    pub(super) target: Assigned,
    pub(super) iterable: Expr,
    pub(super) condition: Option<Expr>,
    pub(super) body: Body,
    pub(super) otherwise: Body,
}

#[derive(Debug)]
pub(super) enum Assigned {
    Name(Arc<str>),
    /// A field of a namespace.
    Field(Arc<str>, Arc<str>),
    Tuple(Vec<Self>),
}

#[derive(Debug, Default)]
pub(super) struct Macro {
    pub(super) name: Arc<str>,
    pub(super) parameters: Vec<Arc<str>>,
    /// Those of the last parameters.
    pub(super) defaults: Vec<Expr>,
    pub(super) body: Body,
    /// Whether the body names `varargs`, `kwargs` and `caller`: others are not accepted.
    pub(super) takes: [bool; 3],
}

#[derive(Debug)]
pub(super) enum Expr {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    Name(Arc<str>),
    List(Vec<Self>),
    Tuple(Vec<Self>),
    Dict(Vec<(Self, Self)>),
    Not(Box<Self>),
    Negate(Box<Self>),
    And(Vec<Self>),
    Or(Vec<Self>),
    Concat(Vec<Self>),
    /// From left to right.
    Arithmetic(Box<Self>, Vec<(Operator, Self)>),
    /// Each with its right neighbor.
    Compare(Box<Self>, Vec<(Comparator, Self)>),
    If(Box<Conditional>),
    Postfix(Box<Self>, Vec<Step>),
}

#[derive(Debug)]
pub(super) struct Conditional {
    pub(super) test: Expr,
    pub(super) then: Expr,
    pub(super) otherwise: Option<Expr>,
}

/// What follows a value: `.name`, `[…]`, `(…)`, `|filter`, `is test`.
#[derive(Debug)]
pub(super) enum Step {
    Attribute(Arc<str>),
    Item(Expr),
    Slice([Option<Expr>; 3]),
    Call(Arguments),
    Filter(Arc<str>, Arguments),
    Test(Arc<str>, Arguments, Negated),
}

/// Whether a test is `is not`.
pub(super) type Negated = bool;

#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub(super) positional: Vec<Expr>,
    pub(super) named: Vec<(Arc<str>, Expr)>,
    /// `*list` and `**dict`.
    pub(super) spread: [Option<Expr>; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparator {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}
