//! Alterations of JSON documents: of what they say and not of how they are written.

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Edit, alter};

/// Sound documents of one kind, to be altered.
pub struct Samples {
    make: fn() -> Vec<Value>,
    values: OnceLock<Vec<Value>>,
}

impl Samples {
    pub const fn new(make: fn() -> Vec<Value>) -> Self {
        Self { make, values: OnceLock::new() }
    }

    /// One of the documents with these alterations, as text.
    ///
    /// # Panics
    /// When a sample is no `T` any more: then it has to be mended.
    pub fn altered<T: DeserializeOwned>(&self, which: u8, alterations: &[Alteration]) -> Vec<u8> {
        let values = self.values.get_or_init(|| {
            let values = (self.make)();
            for value in &values {
                if let Err(error) = T::deserialize(value) {
                    panic!("this sample is no {} any more: {error}: {value}", std::any::type_name::<T>());
                }
            }
            values
        });
        alter_json(values[usize::from(which) % values.len()].clone(), alterations)
    }
}

/// A document with these alterations, as text.
pub fn alter_json(mut value: Value, alterations: &[Alteration]) -> Vec<u8> {
    let mut text = None;
    for alteration in alterations.iter().take(MAX_ALTERATIONS) {
        match alteration {
            Alteration::Text(edits) => text = Some(edits),
            other => other.make(&mut value),
        }
    }
    let mut bytes = value.to_string().into_bytes();
    alter(&mut bytes, text.map_or(&[], Vec::as_slice));
    bytes
}

const MAX_ALTERATIONS: usize = 8;

/// Places are numbered as the document is read, modulo how many there are.
#[derive(Arbitrary, Debug)]
pub enum Alteration<'a> {
    Replace {
        at: u8,
        with: Leaf<'a>,
    },
    /// What is at one place, put at another one.
    Copy {
        from: u8,
        to: u8,
    },
    /// Out of an object or list.
    Remove {
        at: u8,
        member: u8,
    },
    /// Into an object or list.
    Add {
        at: u8,
        name: &'a str,
        with: Leaf<'a>,
    },
    /// The members of a list, several times over.
    Repeat {
        at: u8,
        times: u8,
    },
    /// A text that is nearly what it was.
    Splice {
        at: u8,
        begin: u8,
        end: u8,
        with: &'a str,
    },
    /// A number that is nearly what it was.
    Step {
        at: u8,
        by: i8,
    },
    /// The bytes of the text, at last.
    Text(Vec<Edit<'a>>),
}

#[derive(Arbitrary, Debug)]
pub enum Leaf<'a> {
    Null,
    Bool(bool),
    Number(i64),
    Large(u64),
    Fraction(f64),
    Text(&'a str),
    List,
    Object,
    /// Lists in lists.
    Deep(u8),
}

impl Leaf<'_> {
    fn value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(bool) => (*bool).into(),
            Self::Number(number) => (*number).into(),
            Self::Large(number) => (*number).into(),
            Self::Fraction(number) => (*number).into(),
            Self::Text(text) => (*text).into(),
            Self::List => Value::Array(Vec::new()),
            Self::Object => Value::Object(Map::new()),
            Self::Deep(depth) => (0..*depth).fold(Value::Null, |inner, _| Value::Array(vec![inner])),
        }
    }
}

impl Alteration<'_> {
    fn make(&self, document: &mut Value) {
        match self {
            Self::Replace { at, with } => *place(document, *at) = with.value(),
            Self::Copy { from, to } => {
                let copy = place(document, *from).clone();
                *place(document, *to) = copy;
            }
            Self::Remove { at, member } => match container(document, *at) {
                Value::Object(members) if !members.is_empty() => {
                    let name = members.keys().nth(usize::from(*member) % members.len()).cloned();
                    _ = name.and_then(|name| members.remove(&name));
                }
                Value::Array(members) if !members.is_empty() => _ = members.remove(usize::from(*member) % members.len()),
                _ => {}
            },
            Self::Add { at, name, with } => match container(document, *at) {
                Value::Object(members) => _ = members.insert((*name).to_owned(), with.value()),
                Value::Array(members) => members.push(with.value()),
                _ => {}
            },
            Self::Repeat { at, times } => {
                if let Value::Array(members) = container(document, *at)
                    && members.len() < 1000
                {
                    *members = std::iter::repeat_n(members.clone(), usize::from(*times % 8)).flatten().collect();
                }
            }
            Self::Splice { at, begin, end, with } => {
                if let Value::String(text) = nth(document, *at, &Value::is_string) {
                    let letters: Vec<char> = text.chars().collect();
                    let begin = usize::from(*begin) % (letters.len() + 1);
                    let end = usize::from(*end) % (letters.len() + 1);
                    *text = letters[..begin].iter().chain(with.chars().collect::<Vec<_>>().iter()).chain(&letters[end..]).collect();
                }
            }
            Self::Step { at, by } => {
                let number = nth(document, *at, &Value::is_number);
                if let Some(now) = number.as_i64() {
                    *number = now.wrapping_add((*by).into()).into();
                }
            }
            Self::Text(_) => {}
        }
    }
}

fn place(document: &mut Value, at: u8) -> &mut Value {
    nth(document, at, &|_| true)
}

fn container(document: &mut Value, at: u8) -> &mut Value {
    nth(document, at, &|value| value.is_object() || value.is_array())
}

/// The place of this number among those of a kind; the document itself when there is none.
fn nth<'a>(document: &'a mut Value, at: u8, wanted: &dyn Fn(&Value) -> bool) -> &'a mut Value {
    let count = count(document, wanted);
    let mut left = if count == 0 { return document } else { usize::from(at) % count };
    // Two walks, as a place that was found cannot be kept while the search goes on.
    let mut path = Vec::new();
    find(document, wanted, &mut left, &mut path);
    path.iter().fold(document, |value, step| match value {
        Value::Object(members) => members.values_mut().nth(*step).expect("it was found there"),
        Value::Array(members) => &mut members[*step],
        _ => unreachable!("it was found there"),
    })
}

fn members(value: &Value) -> Box<dyn Iterator<Item = &Value> + '_> {
    match value {
        Value::Object(members) => Box::new(members.values()),
        Value::Array(members) => Box::new(members.iter()),
        _ => Box::new(std::iter::empty()),
    }
}

fn count(value: &Value, wanted: &dyn Fn(&Value) -> bool) -> usize {
    usize::from(wanted(value)) + members(value).map(|member| count(member, wanted)).sum::<usize>()
}

fn find(value: &Value, wanted: &dyn Fn(&Value) -> bool, left: &mut usize, path: &mut Vec<usize>) -> bool {
    if wanted(value) {
        if *left == 0 {
            return true;
        }
        *left -= 1;
    }
    for (step, member) in members(value).enumerate() {
        path.push(step);
        if find(member, wanted, left, path) {
            return true;
        }
        path.pop();
    }
    false
}
