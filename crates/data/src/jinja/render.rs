//! Runs the statements of a template.

use super::arguments::CallValues;
use super::ast::{Assigned, Body, Expr, For, Step, Stmt, StmtKind};
use super::budget::Budget;
use super::parser::Tree;
use super::python::text_of;
use super::value::{Callable, Loop, Value};
use super::{Error, Result};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// The scope of the template's variables.
const ROOT: usize = 0;

/// Names and values. A name that is not here is looked for in the scope around.
#[derive(Debug, Default)]
struct Scope {
    parent: Option<usize>,
    names: Vec<(Arc<str>, Value)>,
}

/// Where a body ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

type NamespaceFields = Rc<RefCell<Vec<(Arc<str>, Value)>>>;

/// A template while it runs.
pub(super) struct Renderer<'t> {
    pub(super) tree: &'t Tree,
    /// The open scopes; the last one is the innermost.
    scopes: Vec<Scope>,
    pub(super) budget: Budget,
    /// Namespaces may hold each other, so they are emptied at the end.
    namespaces: Vec<NamespaceFields>,
}

impl Drop for Renderer<'_> {
    fn drop(&mut self) {
        for fields in &self.namespaces {
            fields.borrow_mut().clear();
        }
    }
}

impl<'t> Renderer<'t> {
    pub(super) fn new(tree: &'t Tree, variables: Vec<(&str, Value)>) -> Self {
        let names = variables.into_iter();
        let root = Scope {
            parent: None,
            names: names.map(|(name, value)| (name.into(), value)).collect(),
        };
        Self {
            tree,
            scopes: vec![root],
            budget: Budget::default(),
            namespaces: Vec::new(),
        }
    }

    pub(super) fn render(mut self) -> Result<String> {
        let mut out = String::new();
        let tree = self.tree;
        self.body(&tree.body, &mut out)?;
        Ok(out)
    }

    /// The value of the only statement, if it shows one.
    pub(super) fn evaluate(mut self) -> Result<Option<Value>> {
        match self.tree.body.as_slice() {
            [only] => match &only.kind {
                StmtKind::Emit(value) => self.value(value).map(Some),
                _ => Ok(None),
            },
            _ => Ok(None),
        }
    }

    fn body(&mut self, body: &'t Body, out: &mut String) -> Result<Flow> {
        for stmt in body {
            match self.statement(stmt, out) {
                Ok(Flow::Next) => {}
                Ok(flow) => return Ok(flow),
                Err(problem) => return Err(problem.at(stmt.line)),
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, stmt: &'t Stmt, out: &mut String) -> Result<Flow> {
        self.budget.step()?;
        self.budget.deeper()?;
        let flow = self.statement_here(stmt, out);
        self.budget.shallower();
        flow
    }

    fn statement_here(&mut self, stmt: &'t Stmt, out: &mut String) -> Result<Flow> {
        match &stmt.kind {
            StmtKind::Text(text) => {
                self.budget.text(text.len())?;
                out.push_str(text);
            }
            StmtKind::Emit(value) => {
                let value = self.value(value)?;
                match &value {
                    Value::Str(text) => {
                        self.budget.text(text.len())?;
                        out.push_str(text);
                    }
                    other => out.push_str(&text_of(other, &self.budget)?),
                }
            }
            StmtKind::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.value(test)?.is_true() {
                        return self.body(body, out);
                    }
                }
                return self.body(otherwise, out);
            }
            StmtKind::For(iteration) => return self.iterate(iteration, out),
            StmtKind::Set(target, value) => {
                let value = self.value(value)?;
                self.assign(target, value)?;
            }
            StmtKind::Capture(target, filters, body) => {
                let text = self.captured(filters, body)?;
                self.assign(target, text)?;
            }
            StmtKind::Macro(number) => {
                let name = self.tree.macros[*number].name.clone();
                let defined = Callable::Macro(*number, self.innermost());
                self.set(name, Value::Callable(Rc::new(defined)));
            }
            StmtKind::Call(number, call) => {
                let caller = Callable::Macro(*number, self.innermost());
                let text = self.call_with(call, Value::Callable(Rc::new(caller)))?;
                out.push_str(&text_of(&text, &self.budget)?);
            }
            StmtKind::Filter(filters, body) => {
                let text = self.captured(filters, body)?;
                out.push_str(&text_of(&text, &self.budget)?);
            }
            StmtKind::With(values, body) => return self.with(values, body, out),
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// The text of a body in a scope of its own, filtered.
    fn captured(&mut self, filters: &'t [Step], body: &'t Body) -> Result<Value> {
        let mut text = String::new();
        let at = self.enter(self.innermost());
        let done = self.body(body, &mut text);
        self.leave(at);
        done?;
        self.steps(Value::str(text), filters)
    }

    fn with(
        &mut self,
        values: &'t [(Assigned, Expr)],
        body: &'t Body,
        out: &mut String,
    ) -> Result<Flow> {
        let values = values.iter();
        let values: Result<Vec<(&Assigned, Value)>> = values
            .map(|(target, value)| Ok((target, self.value(value)?)))
            .collect();
        let values = values?;
        let at = self.enter(self.innermost());
        let run = || {
            for (target, value) in values {
                self.assign(target, value)?;
            }
            self.body(body, out)
        };
        let flow = run();
        self.leave(at);
        flow
    }

    fn iterate(&mut self, iteration: &'t For, out: &mut String) -> Result<Flow> {
        let iterable = self.value(&iteration.iterable)?;
        let mut items = iterable.elements(&self.budget)?;
        if let Some(condition) = &iteration.condition {
            let mut kept = Vec::new();
            for item in items {
                let at = self.enter(self.innermost());
                let holds = self
                    .assign(&iteration.target, item.clone())
                    .and_then(|()| self.value(condition));
                self.leave(at);
                if holds?.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            return self.body(&iteration.otherwise, out);
        }
        let state = Rc::new(Loop {
            items: Rc::new(items),
            index: Cell::new(0),
            last: RefCell::new(None),
        });
        self.turns(iteration, &state, out)?;
        Ok(Flow::Next)
    }

    fn turns(&mut self, iteration: &'t For, state: &Rc<Loop>, out: &mut String) -> Result<()> {
        for (index, item) in state.items.iter().enumerate() {
            self.budget.step()?;
            state.index.set(index);
            let at = self.enter(self.innermost());
            self.set("loop".into(), Value::Loop(Rc::clone(state)));
            let flow = self
                .assign(&iteration.target, item.clone())
                .and_then(|()| self.body(&iteration.body, out));
            self.leave(at);
            if flow? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    fn innermost(&self) -> usize {
        self.scopes.len() - 1
    }

    /// Opens a scope inside of another; its place is for [`Renderer::leave`].
    fn enter(&mut self, parent: usize) -> usize {
        self.scopes.push(Scope {
            parent: Some(parent),
            names: Vec::new(),
        });
        self.scopes.len() - 1
    }

    fn leave(&mut self, at: usize) {
        self.scopes.truncate(at);
    }

    pub(super) fn lookup(&self, name: &Arc<str>) -> Option<&Value> {
        let mut at = Some(self.innermost());
        while let Some(scope) = at.and_then(|at| self.scopes.get(at)) {
            let mut names = scope.names.iter().rev();
            if let Some((_, value)) = names.find(|(found, _)| found == name) {
                return Some(value);
            }
            at = scope.parent;
        }
        None
    }

    fn set(&mut self, name: Arc<str>, value: Value) {
        let Some(scope) = self.scopes.last_mut() else {
            return;
        };
        match scope.names.iter_mut().find(|(found, _)| *found == name) {
            Some((_, old)) => *old = value,
            None => scope.names.push((name, value)),
        }
    }

    fn assign(&mut self, target: &Assigned, value: Value) -> Result<()> {
        match target {
            Assigned::Name(name) => self.set(Arc::clone(name), value),
            Assigned::Field(name, field) => {
                let Some(Value::Namespace(fields)) = self.lookup(name) else {
                    return Err(Error::new(
                        "cannot assign attribute on non-namespace object",
                    ));
                };
                set_field(fields, Arc::clone(field), value)?;
            }
            Assigned::Tuple(targets) => {
                let values = value.elements(&self.budget)?;
                if values.len() != targets.len() {
                    return Err(Error::new(format!(
                        "expected {} values to unpack, found {}",
                        targets.len(),
                        values.len()
                    )));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }

    /// A namespace with these fields.
    pub(super) fn namespace(&mut self, values: Vec<(Arc<str>, Value)>) -> Result<Value> {
        let fields = NamespaceFields::default();
        for (name, value) in values {
            set_field(&fields, name, value)?;
        }
        self.namespaces.push(Rc::clone(&fields));
        Ok(Value::Namespace(fields))
    }

    /// Calls a macro that was defined in `scope`.
    pub(super) fn run_macro(
        &mut self,
        number: usize,
        scope: usize,
        values: CallValues,
    ) -> Result<Value> {
        let tree = self.tree;
        let called = &tree.macros[number];
        // A macro that outlived its scope sees the template's variables.
        let scope = if scope < self.scopes.len() {
            scope
        } else {
            ROOT
        };
        self.budget.deeper()?;
        let at = self.enter(scope);
        let mut text = String::new();
        let done = self
            .bind(called, values)
            .and_then(|()| self.body(&called.body, &mut text));
        self.leave(at);
        self.budget.shallower();
        done?;
        Ok(Value::str(text))
    }

    /// Gives the parameters of a macro their values.
    fn bind(&mut self, called: &'t super::ast::Macro, values: CallValues) -> Result<()> {
        let required = called.parameters.len() - called.defaults.len();
        let CallValues {
            positional,
            mut named,
        } = values;
        let mut positional = positional.into_iter();
        for (index, parameter) in called.parameters.iter().enumerate() {
            let by_name = named.iter().position(|(name, _)| name == parameter);
            let value = match (positional.next(), by_name) {
                (Some(value), _) => value,
                (None, Some(at)) => named.remove(at).1,
                (None, None) => match index.checked_sub(required) {
                    Some(default) => self.value(&called.defaults[default])?,
                    None => Value::undefined(Arc::clone(parameter)),
                },
            };
            self.set(Arc::clone(parameter), value);
        }
        let [varargs, kwargs, caller] = called.takes;
        let by_name = named.iter().position(|(name, _)| &**name == "caller");
        let given = by_name.map(|at| named.remove(at).1);
        if caller {
            self.set(
                "caller".into(),
                given.unwrap_or_else(|| Value::undefined("caller")),
            );
        }
        let (rest, more) = (positional.collect::<Vec<_>>(), !named.is_empty());
        if (!rest.is_empty() && !varargs) || (more && !kwargs) {
            return Err(Error::new(format!(
                "macro '{}' takes not more than {} arguments",
                called.name,
                called.parameters.len()
            )));
        }
        self.set("varargs".into(), Value::tuple(rest)?);
        let named = named
            .into_iter()
            .map(|(name, value)| (Value::Str(name), value));
        self.set("kwargs".into(), Value::dict(named.collect())?);
        Ok(())
    }
}

fn set_field(fields: &NamespaceFields, name: Arc<str>, value: Value) -> Result<()> {
    if name.starts_with('_') {
        return Err(Error::new(format!(
            "a namespace cannot have the field '{name}'"
        )));
    }
    let mut fields = fields.borrow_mut();
    match fields.iter_mut().find(|(found, _)| *found == name) {
        Some((_, old)) => *old = value,
        None => fields.push((name, value)),
    }
    Ok(())
}
