//! Expressions, with Jinja's precedence: `if`, `or`, `and`, `not`, comparisons, `+ -`, `~`, `* / // %`, `**`, signs, and what follows
//! a value.

use super::Parser;
use crate::jinja::Result;
use crate::jinja::ast::{Arguments, Comparator, Conditional, Expr, Operator, Step};
use crate::jinja::lexer::Token;
use std::sync::Arc;

impl Parser {
    pub(super) fn expression(&mut self) -> Result<Expr> {
        self.nested(|parser| {
            let mut value = parser.or()?;
            while parser.take_name("if") {
                let test = parser.or()?;
                let otherwise = match parser.take_name("else") {
                    true => Some(parser.expression()?),
                    false => None,
                };
                value = Expr::If(Box::new(Conditional {
                    test,
                    then: value,
                    otherwise,
                }));
            }
            Ok(value)
        })
    }

    /// Expressions with commas between become a tuple. `ends` are names that come after it.
    pub(super) fn tuple(&mut self, ends: &[&str]) -> Result<Expr> {
        self.tuple_of(ends, Self::expression)
    }

    pub(super) fn tuple_of(
        &mut self,
        ends: &[&str],
        element: impl Fn(&mut Self) -> Result<Expr>,
    ) -> Result<Expr> {
        let first = element(self)?;
        if !self.is_symbol(",") {
            return Ok(first);
        }
        let mut elements = vec![first];
        while self.take(",") {
            if self.ends_tuple(ends) {
                break;
            }
            elements.push(element(self)?);
        }
        Ok(Expr::Tuple(elements))
    }

    fn ends_tuple(&self, ends: &[&str]) -> bool {
        match self.peek() {
            None | Some(Token::EmitEnd | Token::BlockEnd | Token::Symbol(")")) => true,
            Some(Token::Name(name)) => ends.contains(&name.as_str()),
            _ => false,
        }
    }

    pub(super) fn or(&mut self) -> Result<Expr> {
        let parsed = self.several(Self::and, |parser| parser.take_name("or"))?;
        Ok(one_or(parsed, Expr::Or))
    }

    fn and(&mut self) -> Result<Expr> {
        let parsed = self.several(Self::not, |parser| parser.take_name("and"))?;
        Ok(one_or(parsed, Expr::And))
    }

    fn several(
        &mut self,
        part: impl Fn(&mut Self) -> Result<Expr>,
        more: impl Fn(&mut Self) -> bool,
    ) -> Result<Vec<Expr>> {
        let mut parts = vec![part(self)?];
        while more(self) {
            parts.push(part(self)?);
        }
        Ok(parts)
    }

    fn not(&mut self) -> Result<Expr> {
        match self.take_name("not") {
            true => self.nested(|parser| Ok(Expr::Not(Box::new(parser.not()?)))),
            false => self.comparison(),
        }
    }

    fn comparison(&mut self) -> Result<Expr> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        while let Some(comparison) = self.comparison_operator() {
            rest.push((comparison, self.sum()?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Compare(Box::new(first), rest),
        })
    }

    fn comparison_operator(&mut self) -> Option<Comparator> {
        let symbols = [
            ("==", Comparator::Equal),
            ("!=", Comparator::NotEqual),
            ("<", Comparator::Less),
            ("<=", Comparator::LessEqual),
            (">", Comparator::Greater),
            (">=", Comparator::GreaterEqual),
        ];
        let found = symbols.into_iter().find(|(symbol, _)| self.take(symbol));
        if let Some((_, comparison)) = found {
            return Some(comparison);
        }
        if self.take_name("in") {
            return Some(Comparator::In);
        }
        let after = self.tokens.get(self.at + 1).map(|(token, _)| token);
        let not_in = matches!(after, Some(Token::Name(name)) if name == "in");
        (not_in && self.take_name("not") && self.take_name("in")).then_some(Comparator::NotIn)
    }

    fn sum(&mut self) -> Result<Expr> {
        self.chain(
            Self::concatenation,
            &[("+", Operator::Add), ("-", Operator::Subtract)],
        )
    }

    fn concatenation(&mut self) -> Result<Expr> {
        let parsed = self.several(Self::product, |parser| parser.take("~"))?;
        Ok(one_or(parsed, Expr::Concat))
    }

    fn product(&mut self) -> Result<Expr> {
        let operators = [
            ("*", Operator::Multiply),
            ("/", Operator::Divide),
            ("//", Operator::FloorDivide),
            ("%", Operator::Modulo),
        ];
        self.chain(Self::power, &operators)
    }

    fn power(&mut self) -> Result<Expr> {
        self.chain(|parser| parser.signed(true), &[("**", Operator::Power)])
    }

    fn chain(
        &mut self,
        part: impl Fn(&mut Self) -> Result<Expr>,
        operators: &[(&str, Operator)],
    ) -> Result<Expr> {
        let first = part(self)?;
        let mut rest = Vec::new();
        while let Some((_, operator)) = operators.iter().find(|(symbol, _)| self.take(symbol)) {
            rest.push((*operator, part(self)?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Arithmetic(Box::new(first), rest),
        })
    }

    /// A value with a sign perhaps, and with what follows it.
    fn signed(&mut self, with_filters: bool) -> Result<Expr> {
        self.nested(|parser| {
            let value = if parser.take("-") {
                Expr::Negate(Box::new(parser.signed(false)?))
            } else if parser.take("+") {
                parser.signed(false)?
            } else {
                parser.primary()?
            };
            let mut steps = Vec::new();
            parser.subscripts(&mut steps)?;
            while with_filters && parser.filter_or_test(&mut steps)? {}
            Ok(match steps.is_empty() {
                true => value,
                false => Expr::Postfix(Box::new(value), steps),
            })
        })
    }

    fn primary(&mut self) -> Result<Expr> {
        let Some(token) = self.next() else {
            return self.fail("unexpected end of template");
        };
        Ok(match token {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Expr::Bool(true),
                "false" | "False" => Expr::Bool(false),
                "none" | "None" => Expr::None,
                _ => Expr::Name(name.into()),
            },
            Token::Str(mut text) => {
                while let Some(Token::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Expr::Str(text.into())
            }
            Token::Int(value) => Expr::Int(value),
            Token::Float(value) => Expr::Float(value),
            Token::Symbol("(") => {
                if self.take(")") {
                    return Ok(Expr::Tuple(Vec::new()));
                }
                let value = self.tuple(&[])?;
                self.expect(")")?;
                value
            }
            Token::Symbol("[") => {
                let element = |parser: &mut Self| parser.expression();
                Expr::List(self.until("]", element)?)
            }
            Token::Symbol("{") => Expr::Dict(self.until("}", |parser| {
                let key = parser.expression()?;
                parser.expect(":")?;
                Ok((key, parser.expression()?))
            })?),
            _ => {
                self.at -= 1;
                return self.fail("expected an expression");
            }
        })
    }

    /// Elements with commas between, and perhaps after the last, up to a bracket.
    fn until<T>(
        &mut self,
        close: &str,
        element: impl Fn(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut elements = Vec::new();
        while !self.take(close) {
            if !elements.is_empty() {
                self.expect(",")?;
                if self.take(close) {
                    break;
                }
            }
            elements.push(element(self)?);
        }
        Ok(elements)
    }

    /// `.name`, `[…]` and `(…)`.
    fn subscripts(&mut self, steps: &mut Vec<Step>) -> Result<()> {
        loop {
            if self.take(".") {
                steps.push(match self.peek() {
                    Some(Token::Int(index)) => Step::Item(Expr::Int(*index)),
                    Some(Token::Name(name)) => Step::Attribute(name.as_str().into()),
                    _ => return self.fail("expected name or number"),
                });
                self.at += 1;
            } else if self.take("[") {
                steps.push(self.item()?);
            } else if self.is_symbol("(") {
                steps.push(Step::Call(self.arguments()?));
            } else {
                return Ok(());
            }
        }
    }

    /// An index or a slice, after `[`.
    fn item(&mut self) -> Result<Step> {
        let ends = |parser: &Self| parser.is_symbol("]") || parser.is_symbol(":");
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        let mut colons = 0;
        loop {
            if !ends(self) {
                parts[colons] = Some(self.expression()?);
            }
            if colons == 2 || !self.take(":") {
                break;
            }
            colons += 1;
        }
        self.expect("]")?;
        match (colons, parts) {
            (0, [Some(index), ..]) => Ok(Step::Item(index)),
            (0, _) => self.fail("expected an index"),
            (_, parts) => Ok(Step::Slice(parts)),
        }
    }

    /// `|filter`, `is test` or `(…)`, if one comes next.
    fn filter_or_test(&mut self, steps: &mut Vec<Step>) -> Result<bool> {
        if self.is_symbol("|") {
            steps.extend(self.filters(false)?);
        } else if self.take_name("is") {
            steps.push(self.test()?);
        } else if self.is_symbol("(") {
            steps.push(Step::Call(self.arguments()?));
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// Filters, each after `|`; in the tag `filter` the first has none.
    pub(super) fn filters(&mut self, mut bare: bool) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        while bare || self.take("|") {
            bare = false;
            let name = self.name()?;
            let arguments = match self.is_symbol("(") {
                true => self.arguments()?,
                false => Arguments::default(),
            };
            steps.push(Step::Filter(name, arguments));
        }
        Ok(steps)
    }

    fn test(&mut self) -> Result<Step> {
        let negated = self.take_name("not");
        let name: Arc<str> = self.name()?;
        let mut arguments = Arguments::default();
        let has_argument = match self.peek() {
            Some(Token::Symbol("(")) => {
                arguments = self.arguments()?;
                false
            }
            Some(Token::Name(next)) => !matches!(
                next.as_str(),
                "else" | "or" | "and" | "if" | "in" | "not" | "is"
            ),
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Symbol("[" | "{")) => {
                true
            }
            _ => false,
        };
        if has_argument {
            let value = self.primary()?;
            let mut steps = Vec::new();
            self.subscripts(&mut steps)?;
            arguments.positional.push(match steps.is_empty() {
                true => value,
                false => Expr::Postfix(Box::new(value), steps),
            });
        }
        Ok(Step::Test(name, arguments, negated))
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect("(")?;
        let mut found = Arguments::default();
        while !self.take(")") {
            let is_first = found.positional.is_empty() && found.named.is_empty();
            if !is_first || found.spread.iter().any(Option::is_some) {
                self.expect(",")?;
                if self.take(")") {
                    break;
                }
            }
            let after = self.tokens.get(self.at + 1).map(|(token, _)| token);
            let is_named = after == Some(&Token::Symbol("="));
            if self.take("*") {
                found.spread[0] = Some(self.expression()?);
            } else if self.take("**") {
                found.spread[1] = Some(self.expression()?);
            } else if is_named && matches!(self.peek(), Some(Token::Name(_))) {
                let name = self.name()?;
                self.expect("=")?;
                found.named.push((name, self.expression()?));
            } else if found.named.is_empty() {
                found.positional.push(self.expression()?);
            } else {
                return self.fail("expected named arguments after the first of them");
            }
        }
        Ok(found)
    }
}

/// The only part, or the parts together.
fn one_or(mut parts: Vec<Expr>, together: impl Fn(Vec<Expr>) -> Expr) -> Expr {
    match (parts.pop(), parts.is_empty()) {
        (Some(one), true) => one,
        (last, _) => {
            parts.extend(last);
            together(parts)
        }
    }
}
