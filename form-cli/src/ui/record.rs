//! One thing in full, a line for each property.

use super::printable;

#[derive(Debug)]
pub struct Record {
    name: String,
    fields: Vec<Field>,
}

#[derive(Debug)]
struct Field {
    title: String,
    value: String,
    wide: bool,
}

impl Record {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), fields: Vec::new() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Left out when the value is empty.
    #[must_use]
    pub fn field(self, title: &str, value: impl ToString) -> Self {
        self.push(title, value.to_string(), false)
    }

    /// Shown with `-o wide` alone.
    #[must_use]
    pub fn wide(self, title: &str, value: impl ToString) -> Self {
        self.push(title, value.to_string(), true)
    }

    #[must_use]
    pub fn optional(self, title: &str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.field(title, value),
            None => self,
        }
    }

    fn push(mut self, title: &str, value: String, wide: bool) -> Self {
        self.fields.push(Field { title: title.to_owned(), value: printable(&value), wide });
        self
    }

    /// Values that are too long for the width go on lines of their own, below their title.
    pub fn render(&self, wide: bool, width: usize) -> String {
        let shown = || self.fields.iter().filter(|field| (wide || !field.wide) && !field.value.is_empty());
        let indent = shown().map(|field| field.title.len()).max().unwrap_or(0);
        let mut text = String::new();
        for Field { title, value, .. } in shown() {
            let first_fits = !value.contains('\n') && indent + 2 + value.chars().count() <= width;
            if first_fits {
                text.push_str(&format!("{title:indent$}  {value}\n"));
            } else {
                text.push_str(&format!("{title}\n"));
                for line in value.lines() {
                    text.push_str(&format!("  {line}\n"));
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_move_down() {
        let record = Record::new("web").field("name", "web").field("digest", "d".repeat(30)).field("empty", "").wide("id", 7);
        assert_eq!(record.render(false, 80), format!("name    web\ndigest  {}\n", "d".repeat(30)));
        assert_eq!(record.render(true, 20), format!("name    web\ndigest\n  {}\nid      7\n", "d".repeat(30)));
    }
}
