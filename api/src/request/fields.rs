//! The fields of a JSON object: each is asked for once, and what nobody asked for is unknown.

use serde_json::{Map, Value};

use super::{Problem, Violation};

/// Longest part of a client's text that is said back, characters.
const ECHO: usize = 80;

/// Most violations that are told of one object. A body can have thousands of unknown keys.
const MOST: usize = 64;

pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Pointer to the object.
    base: &'static str,
    asked: Vec<&'static str>,
    violations: Vec<Violation>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, base: &'static str) -> Self {
        Self { map, base, asked: Vec::new(), violations: Vec::new() }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// What was found.
    pub(super) fn violations(self) -> Vec<Violation> {
        self.violations
    }

    /// What was found, unknown fields included.
    pub(super) fn done(mut self) -> Vec<Violation> {
        let mut known = self.asked.clone();
        known.sort_unstable();
        known.dedup();
        for key in self.map.keys().filter(|key| !known.contains(&key.as_str())).take(MOST) {
            let message = format!("unknown field `{}`; known are {}", cut(key), known.join(", "));
            self.violations.push(Violation {
                problem: Problem::Unknown,
                message,
                pointer: format!(
                    "{}/{}",
                    self.base,
                    cut(&key.replace('~', "~0").replace('/', "~1"))
                ),
            });
        }
        self.violations
    }

    pub(super) fn violation(&mut self, problem: Problem, key: &str, message: impl Into<String>) {
        let (message, pointer) = (message.into(), format!("{}/{key}", self.base));
        self.violations.push(Violation { problem, message, pointer });
    }

    pub(super) fn extend(&mut self, violations: Vec<Violation>) {
        self.violations.extend(violations);
    }

    pub(super) fn missing(&mut self, key: &'static str) {
        self.asked.push(key);
        self.violation(Problem::Missing, key, format!("`{key}` is required"));
    }

    /// A field's value; `null` is the same as nothing, as some clients send it.
    fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.asked.push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn required(&mut self, key: &'static str) -> Option<&'a Value> {
        let value = self.value(key);
        if value.is_none() {
            self.missing(key);
        }
        value
    }

    fn wrong_type(&mut self, key: &'static str, must: &str, value: &Value) {
        let is = match value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        self.violation(Problem::Type, key, format!("`{key}` must be {must}, but is {is}"));
    }

    /// One of a few words, which must be there.
    pub(super) fn choice(
        &mut self,
        key: &'static str,
        choices: &[&'static str],
    ) -> Option<&'static str> {
        let value = self.required(key)?;
        let Some(text) = value.as_str() else {
            self.wrong_type(key, "a string", value);
            return None;
        };
        let found = choices.iter().find(|choice| **choice == text).copied();
        if found.is_none() {
            let message =
                format!("`{key}` is `{}`, but must be {}", cut(text), choices.join(" or "));
            self.violation(Problem::Value, key, message);
        }
        found
    }

    pub(super) fn required_number(
        &mut self,
        key: &'static str,
        least: u64,
        most: u64,
    ) -> Option<u64> {
        if self.has(key) {
            return self.number(key, least, most);
        }
        self.missing(key);
        None
    }

    /// A whole number. Clients with one type for numbers send 300 as `300.0`.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "no limit is beyond the whole numbers that a float has"
    )]
    pub(super) fn number(&mut self, key: &'static str, least: u64, most: u64) -> Option<u64> {
        let value = self.value(key)?;
        let Some(number) = value.as_f64().filter(|_| value.is_number()) else {
            self.wrong_type(key, "a number", value);
            return None;
        };
        if number.fract() != 0.0 || number < least as f64 || number > most as f64 {
            let message = format!(
                "`{key}` is {}, but must be a whole number from {least} to {most}",
                cut(&value.to_string())
            );
            self.violation(Problem::Value, key, message);
            return None;
        }
        Some(number as u64)
    }

    pub(super) fn required_text(&mut self, key: &'static str, longest: usize) -> Option<&'a str> {
        if self.has(key) {
            return self.text(key, longest);
        }
        self.missing(key);
        None
    }

    /// A text of up to so many bytes.
    pub(super) fn text(&mut self, key: &'static str, longest: usize) -> Option<&'a str> {
        let value = self.value(key)?;
        let Some(text) = value.as_str() else {
            self.wrong_type(key, "a string", value);
            return None;
        };
        if text.len() > longest {
            let message = format!("`{key}` has {} bytes, but may have {longest}", text.len());
            self.violation(Problem::Value, key, message);
            return None;
        }
        Some(text)
    }

    pub(super) fn object(&mut self, key: &'static str) -> Option<&'a Map<String, Value>> {
        let value = self.value(key)?;
        if value.as_object().is_none() {
            self.wrong_type(key, "an object", value);
        }
        value.as_object()
    }
}

/// The beginning of a text that may be long.
pub(super) fn cut(text: &str) -> String {
    match text.char_indices().nth(ECHO) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}
