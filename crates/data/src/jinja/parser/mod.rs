//! Tokens to a tree: statements here, expressions in `expression.rs`.
//!
//! Source: pallets/jinja: src/jinja2/parser.py; and huggingface/transformers: utils/chat_template_utils.py, for `generation`.

mod expression;

use super::ast::{Assigned, Body, Expr, For, Macro, Step, Stmt, StmtKind};
use super::lexer::{Token, tokens};
use super::{Error, Result, Syntax};
use std::sync::Arc;

/// The deepest nesting of statements and expressions; each level takes a part of the stack.
const MAX_WRITTEN_DEPTH: usize = 64;

/// A template's statements, and its macros by number.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) body: Body,
    pub(super) macros: Vec<Macro>,
    pub(super) syntax: Syntax,
}

pub(super) fn parse(source: &str, syntax: Syntax) -> Result<Tree> {
    let mut parser = Parser {
        tokens: tokens(source, syntax)?,
        at: 0,
        depth: 0,
        macros: Vec::new(),
    };
    let (body, _) = parser.body(&[])?;
    Ok(Tree {
        body,
        macros: parser.macros,
        syntax,
    })
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: usize,
    macros: Vec<Macro>,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens
            .get(self.at.min(last))
            .map_or(1, |(_, line)| *line)
    }

    fn fail<T>(&self, problem: &str) -> Result<T> {
        Err(Error::syntax(problem, self.line()))
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at)?.0.clone();
        self.at += 1;
        Some(token)
    }

    fn is_symbol(&self, symbol: &str) -> bool {
        matches!(self.peek(), Some(Token::Symbol(found)) if *found == symbol)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if found == name)
    }

    /// Takes a symbol if it comes next.
    fn take(&mut self, symbol: &str) -> bool {
        let found = self.is_symbol(symbol);
        self.at += usize::from(found);
        found
    }

    fn take_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, symbol: &str) -> Result<()> {
        match self.take(symbol) {
            true => Ok(()),
            false => self.fail(&format!("expected '{symbol}'")),
        }
    }

    fn name(&mut self) -> Result<Arc<str>> {
        match self.peek() {
            Some(Token::Name(name)) => {
                let name = Arc::from(name.as_str());
                self.at += 1;
                Ok(name)
            }
            _ => self.fail("expected a name"),
        }
    }

    fn block_end(&mut self) -> Result<()> {
        match self.next() {
            Some(Token::BlockEnd) => Ok(()),
            _ => {
                self.at = self.at.saturating_sub(1);
                self.fail("expected the end of the block")
            }
        }
    }

    /// Runs a part of the parser one level deeper.
    fn nested<T>(&mut self, part: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_WRITTEN_DEPTH {
            return self.fail("nested too deeply");
        }
        self.depth += 1;
        let parsed = part(self);
        self.depth -= 1;
        parsed
    }

    /// Statements up to a block of one of these names, which is taken up to its arguments. At the outermost level there are none.
    fn body(&mut self, ends: &[&str]) -> Result<(Body, String)> {
        self.nested(|parser| {
            let mut body = Body::new();
            while let Some(token) = parser.next() {
                let line = parser.line();
                let kind = match token {
                    Token::Text(text) => StmtKind::Text(text),
                    Token::EmitBegin => {
                        let value = parser.tuple(&[])?;
                        match parser.next() {
                            Some(Token::EmitEnd) => StmtKind::Emit(value),
                            _ => return parser.fail("expected the end of the expression"),
                        }
                    }
                    Token::BlockBegin => {
                        let name = parser.name()?;
                        if ends.contains(&&*name) {
                            return Ok((body, name.to_string()));
                        }
                        parser.statement(&name)?
                    }
                    _ => return parser.fail("expected a statement"),
                };
                body.push(Stmt { line, kind });
            }
            match ends {
                [] => Ok((body, String::new())),
                _ => parser.fail(&format!("expected one of {}", ends.join(", "))),
            }
        })
    }

    /// A body up to one end, which is taken whole.
    fn closed(&mut self, end: &str) -> Result<Body> {
        let (body, _) = self.body(&[end])?;
        // A macro may be named again.
        if end == "endmacro" && !matches!(self.peek(), Some(Token::BlockEnd)) {
            self.name()?;
        }
        self.block_end()?;
        Ok(body)
    }

    fn statement(&mut self, name: &str) -> Result<StmtKind> {
        match name {
            "if" => self.conditions(),
            "for" => self.iteration(),
            "set" => self.assignment(),
            "macro" => self.macro_definition(),
            "call" => self.call_block(),
            "filter" => {
                let steps = self.filters(true)?;
                self.block_end()?;
                Ok(StmtKind::Filter(steps, self.closed("endfilter")?))
            }
            "with" => self.with_block(),
            // Hugging Face's mark around the assistant's text.
            "generation" => {
                self.block_end()?;
                Ok(StmtKind::With(Vec::new(), self.closed("endgeneration")?))
            }
            "break" | "continue" => {
                self.block_end()?;
                Ok(match name {
                    "break" => StmtKind::Break,
                    _ => StmtKind::Continue,
                })
            }
            other => self.fail(&format!("unknown tag '{other}'")),
        }
    }

    fn conditions(&mut self) -> Result<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple_of(&[], Self::or)?;
            self.block_end()?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            let otherwise = match end.as_str() {
                "elif" => continue,
                "else" => {
                    self.block_end()?;
                    self.closed("endif")?
                }
                _ => {
                    self.block_end()?;
                    Body::new()
                }
            };
            return Ok(StmtKind::If(branches, otherwise));
        }
    }

    fn iteration(&mut self) -> Result<StmtKind> {
        let target = self.target(&["in"])?;
        if !self.take_name("in") {
            return self.fail("expected 'in'");
        }
        let iterable = self.tuple_of(&["if", "recursive"], Self::or)?;
        let condition = match self.take_name("if") {
            true => Some(self.expression()?),
            false => None,
        };
        if self.is_name("recursive") {
            return self.fail("loops that call themselves are not supported");
        }
        self.block_end()?;
        let (body, end) = self.body(&["else", "endfor"])?;
        self.block_end()?;
        let otherwise = match end.as_str() {
            "else" => self.closed("endfor")?,
            _ => Body::new(),
        };
        Ok(StmtKind::For(Box::new(For {
            target,
            iterable,
            condition,
            body,
            otherwise,
        })))
    }

    fn assignment(&mut self) -> Result<StmtKind> {
        let target = self.target(&[])?;
        if self.take("=") {
            let value = self.tuple(&[])?;
            self.block_end()?;
            return Ok(StmtKind::Set(target, value));
        }
        let steps = self.filters(false)?;
        self.block_end()?;
        Ok(StmtKind::Capture(target, steps, self.closed("endset")?))
    }

    /// Names, or fields of namespaces, with commas between.
    fn target(&mut self, ends: &[&str]) -> Result<Assigned> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            if self.take("(") {
                targets.push(self.nested(|parser| parser.target(&[]))?);
                self.expect(")")?;
            } else {
                let name = self.name()?;
                targets.push(match self.take(".") {
                    true => Assigned::Field(name, self.name()?),
                    false => Assigned::Name(name),
                });
            }
            if !self.take(",") {
                break;
            }
            is_tuple = true;
            let ends = ends.iter().any(|end| self.is_name(end));
            if ends || self.is_symbol("=") || self.is_symbol(")") {
                break;
            }
        }
        match (targets.pop(), is_tuple) {
            (Some(one), false) => Ok(one),
            (last, _) => Ok(Assigned::Tuple(targets.into_iter().chain(last).collect())),
        }
    }

    fn macro_definition(&mut self) -> Result<StmtKind> {
        let name = self.name()?;
        let (parameters, defaults) = self.signature()?;
        self.block_end()?;
        self.add_macro(name, parameters, defaults, "endmacro")
            .map(StmtKind::Macro)
    }

    fn call_block(&mut self) -> Result<StmtKind> {
        let (parameters, defaults) = match self.is_symbol("(") {
            true => self.signature()?,
            false => Default::default(),
        };
        let call = self.expression()?;
        if !matches!(&call, Expr::Postfix(_, steps) if matches!(steps.last(), Some(Step::Call(_))))
        {
            return self.fail("expected a call");
        }
        self.block_end()?;
        let number = self.add_macro("caller".into(), parameters, defaults, "endcall")?;
        Ok(StmtKind::Call(number, call))
    }

    fn add_macro(
        &mut self,
        name: Arc<str>,
        parameters: Vec<Arc<str>>,
        defaults: Vec<Expr>,
        end: &str,
    ) -> Result<usize> {
        let from = self.at;
        let body = self.closed(end)?;
        let names = ["varargs", "kwargs", "caller"];
        let takes = names.map(|name| {
            let mut tokens = self.tokens[from..self.at].iter();
            tokens.any(|(token, _)| matches!(token, Token::Name(found) if found == name))
        });
        self.macros.push(Macro {
            name,
            parameters,
            defaults,
            body,
            takes,
        });
        Ok(self.macros.len() - 1)
    }

    /// `(a, b=1)`: names, and the defaults of the last ones.
    fn signature(&mut self) -> Result<(Vec<Arc<str>>, Vec<Expr>)> {
        let (mut parameters, mut defaults) = (Vec::new(), Vec::new());
        self.expect("(")?;
        while !self.take(")") {
            if !parameters.is_empty() {
                self.expect(",")?;
            }
            parameters.push(self.name()?);
            if self.take("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self
                    .fail("expected a default for every parameter after the first with one");
            }
        }
        Ok((parameters, defaults))
    }

    fn with_block(&mut self) -> Result<StmtKind> {
        let mut values = Vec::new();
        while !matches!(self.peek(), Some(Token::BlockEnd)) {
            if !values.is_empty() {
                self.expect(",")?;
            }
            let target = Assigned::Name(self.name()?);
            self.expect("=")?;
            values.push((target, self.expression()?));
        }
        self.block_end()?;
        Ok(StmtKind::With(values, self.closed("endwith")?))
    }
}
