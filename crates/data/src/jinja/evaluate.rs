//! The values of expressions.

use super::arguments::CallValues;
use super::ast::{Arguments, Expr, Step};
use super::operators;
use super::python::text_of;
use super::render::Renderer;
use super::value::{Callable, Value};
use super::{Error, Result, Syntax, filters, format, functions, methods, predicates};
use std::rc::Rc;
use std::sync::Arc;

impl<'t> Renderer<'t> {
    pub(super) fn value(&mut self, expr: &'t Expr) -> Result<Value> {
        let value = self.value_or_undefined(expr)?;
        self.expect_defined(&value)?;
        Ok(value)
    }

    /// Refuses a name without a value, where those are errors. Jinja2 does so when the value is used.
    fn expect_defined(&self, value: &Value) -> Result<()> {
        match value {
            Value::Undefined(name) if self.tree.syntax == Syntax::Harness => {
                Err(Error::new(format!("'{name}' is undefined")))
            }
            _ => Ok(()),
        }
    }

    /// The value of an expression that may have none.
    fn value_or_undefined(&mut self, expr: &'t Expr) -> Result<Value> {
        self.budget.step()?;
        Ok(match expr {
            Expr::None => Value::None,
            Expr::Bool(flag) => Value::Bool(*flag),
            Expr::Int(number) => Value::Int(*number),
            Expr::Float(number) => Value::Float(*number),
            Expr::Str(text) => Value::Str(Arc::clone(text)),
            Expr::Name(name) => self.named(name),
            compound => {
                self.budget.deeper()?;
                let value = self.compound(compound);
                self.budget.shallower();
                value?
            }
        })
    }

    fn named(&self, name: &Arc<str>) -> Value {
        if let Some(value) = self.lookup(name) {
            return value.clone();
        }
        match functions::FUNCTIONS
            .iter()
            .find(|function| **function == &**name)
        {
            Some(function) => Value::Callable(Rc::new(Callable::Function(function))),
            None => Value::Undefined(Arc::clone(name)),
        }
    }

    fn values(&mut self, exprs: &'t [Expr]) -> Result<Vec<Value>> {
        exprs.iter().map(|expr| self.value(expr)).collect()
    }

    fn compound(&mut self, expr: &'t Expr) -> Result<Value> {
        match expr {
            Expr::List(items) => Value::list(self.values(items)?),
            Expr::Tuple(items) => Value::tuple(self.values(items)?),
            Expr::Dict(entries) => {
                let pair =
                    |(key, value): &'t (Expr, Expr)| Ok((self.value(key)?, self.value(value)?));
                Value::dict(entries.iter().map(pair).collect::<Result<_>>()?)
            }
            Expr::Not(value) => Ok(Value::Bool(!self.value(value)?.is_true())),
            Expr::Negate(value) => operators::negate(&self.value(value)?),
            Expr::And(parts) => self.first_that(parts, false),
            Expr::Or(parts) => self.first_that(parts, true),
            Expr::Concat(parts) => self.concatenation(parts),
            Expr::Arithmetic(first, rest) => {
                let mut value = self.value(first)?;
                for (operator, next) in rest {
                    let next = self.value(next)?;
                    value = operators::arithmetic(*operator, &value, &next, &self.budget)?;
                }
                Ok(value)
            }
            Expr::Compare(first, rest) => {
                let mut left = self.value(first)?;
                for (comparison, right) in rest {
                    let right = self.value(right)?;
                    if !operators::compare(*comparison, &left, &right, &self.budget)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::If(conditional) => {
                if self.value(&conditional.test)?.is_true() {
                    return self.value(&conditional.then);
                }
                match &conditional.otherwise {
                    Some(value) => self.value(value),
                    None => Ok(Value::undefined("inline if without else")),
                }
            }
            Expr::Postfix(base, steps) => {
                let base = self.value_or_undefined(base)?;
                self.steps(base, steps)
            }
            simple => self.value(simple),
        }
    }

    /// The first part that is `wanted`, or else the last.
    fn first_that(&mut self, parts: &'t [Expr], wanted: bool) -> Result<Value> {
        let mut value = Value::None;
        for part in parts {
            value = self.value(part)?;
            if value.is_true() == wanted {
                break;
            }
        }
        Ok(value)
    }

    fn concatenation(&mut self, parts: &'t [Expr]) -> Result<Value> {
        let mut text = String::new();
        for part in parts {
            let value = self.value(part)?;
            match &value {
                Value::Str(part) => {
                    self.budget.text(part.len())?;
                    text.push_str(part);
                }
                other => text.push_str(&text_of(other, &self.budget)?),
            }
        }
        Ok(Value::str(text))
    }

    /// A value with what follows it.
    pub(super) fn steps(&mut self, mut value: Value, steps: &'t [Step]) -> Result<Value> {
        for step in steps {
            self.budget.step()?;
            if !takes_undefined(step) {
                self.expect_defined(&value)?;
            }
            value = self.follow(value, step)?;
        }
        Ok(value)
    }

    fn follow(&mut self, value: Value, step: &'t Step) -> Result<Value> {
        match step {
            Step::Attribute(name) => methods::attribute(&value, name, &self.budget),
            Step::Item(index) => {
                let index = self.value(index)?;
                self.item(&value, &index)
            }
            Step::Slice(bounds) => {
                let [start, stop, step] = bounds;
                let mut bound = |bound: &'t Option<Expr>| {
                    bound.as_ref().map(|bound| self.value(bound)).transpose()
                };
                let bounds = [bound(start)?, bound(stop)?, bound(step)?];
                operators::slice(&value, &bounds, &self.budget)
            }
            Step::Call(arguments) => {
                let values = self.arguments(arguments)?;
                self.call(&value, values)
            }
            Step::Filter(name, arguments) => {
                let values = self.arguments(arguments)?;
                self.filter(name, value, values)
            }
            Step::Test(name, arguments, negated) => {
                let values = self.arguments(arguments)?;
                let holds = self.test(name, &value, values)?;
                Ok(Value::Bool(holds != *negated))
            }
        }
    }

    /// `value | name(values)`
    pub(super) fn filter(&mut self, name: &str, value: Value, values: CallValues) -> Result<Value> {
        filters::apply(self, name, value, values)
    }

    /// `value is name(values)`
    pub(super) fn test(&self, name: &str, value: &Value, values: CallValues) -> Result<bool> {
        predicates::holds(&self.budget, name, value, values)
    }

    /// `value[index]`; a method of that name if there is no such key, as Jinja has it.
    pub(super) fn item(&self, value: &Value, index: &Value) -> Result<Value> {
        let found = operators::item(value, index, &self.budget)?;
        match (&found, index) {
            (Value::Undefined(_), Value::Str(name) | Value::Markup(name)) => {
                methods::attribute(value, name, &self.budget)
            }
            _ => Ok(found),
        }
    }

    fn arguments(&mut self, arguments: &'t Arguments) -> Result<CallValues> {
        let mut values = CallValues {
            positional: self.values(&arguments.positional)?,
            named: Vec::with_capacity(arguments.named.len()),
        };
        for (name, value) in &arguments.named {
            values.named.push((Arc::clone(name), self.value(value)?));
        }
        let [list, dict] = &arguments.spread;
        if let Some(list) = list {
            let list = self.value(list)?;
            values.positional.extend(list.elements(&self.budget)?);
        }
        if let Some(dict) = dict {
            let Value::Dict(dict) = self.value(dict)? else {
                return Err(Error::new("argument after ** must be a mapping"));
            };
            for (name, value) in &dict.entries {
                let Value::Str(name) = name else {
                    return Err(Error::new("keywords must be strings"));
                };
                values.named.push((Arc::clone(name), value.clone()));
            }
        }
        Ok(values)
    }

    /// A call with a `caller`.
    pub(super) fn call_with(&mut self, call: &'t Expr, caller: Value) -> Result<Value> {
        let Expr::Postfix(base, steps) = call else {
            return Err(Error::new("expected a call"));
        };
        let Some((Step::Call(arguments), before)) = steps.split_last() else {
            return Err(Error::new("expected a call"));
        };
        let base = self.value(base)?;
        let called = self.steps(base, before)?;
        let mut values = self.arguments(arguments)?;
        values.named.push(("caller".into(), caller));
        self.call(&called, values)
    }

    pub(super) fn call(&mut self, called: &Value, values: CallValues) -> Result<Value> {
        let Value::Callable(callable) = called else {
            return Err(Error::new(match called {
                Value::Undefined(name) => format!("'{name}' is undefined"),
                other => format!("'{}' object is not callable", other.kind()),
            }));
        };
        match &**callable {
            Callable::Function(name) => functions::call(self, name, values),
            Callable::Method(Value::Str(text), name) if name.starts_with("format") => {
                format::format_method(self, text, name, values)
            }
            Callable::Method(value, name) => methods::call(&self.budget, value, name, values),
            Callable::Macro(number, scope) => self.run_macro(*number, *scope, values),
            Callable::Cycler(items, place) => {
                place.set((place.get() + 1) % items.len().max(1));
                Ok(items[(place.get() + items.len() - 1) % items.len().max(1)].clone())
            }
            Callable::Joiner(text, used) => Ok(match used.replace(true) {
                true => Value::Str(Arc::clone(text)),
                false => Value::str(""),
            }),
        }
    }
}

/// Whether a step is for values that may be missing.
fn takes_undefined(step: &Step) -> bool {
    match step {
        Step::Filter(name, _) => matches!(&**name, "default" | "d"),
        Step::Test(name, ..) => matches!(&**name, "defined" | "undefined"),
        _ => false,
    }
}
