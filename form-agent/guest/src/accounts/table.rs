//! A file of lines with colon-separated fields. Lines that are not understood are kept as they are.

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    rows: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row(Vec<String>);

impl Table {
    pub fn parse(text: &str) -> Self {
        Self { rows: text.lines().map(|line| Row(line.split(':').map(str::to_owned).collect())).collect() }
    }

    pub fn render(&self) -> String {
        self.rows.iter().fold(String::new(), |mut text, row| {
            text.push_str(&row.0.join(":"));
            text.push('\n');
            text
        })
    }

    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter()
    }

    pub fn get(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.field(0) == name && row.0.len() > 1)
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut Row> {
        self.rows.iter_mut().find(|row| row.field(0) == name && row.0.len() > 1)
    }

    pub fn push<const N: usize>(&mut self, fields: [&str; N]) {
        self.rows.push(Row(fields.map(str::to_owned).to_vec()));
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl Row {
    /// A field by position; empty when the line is too short.
    pub fn field(&self, position: usize) -> &str {
        self.0.get(position).map_or("", String::as_str)
    }

    pub fn number(&self, position: usize) -> Option<u32> {
        self.field(position).parse().ok()
    }

    /// Sets a field, making the line longer when it must be.
    pub fn set(&mut self, position: usize, value: &str) {
        if self.0.len() <= position {
            self.0.resize(position + 1, String::new());
        }
        if let Some(field) = self.0.get_mut(position) {
            value.clone_into(field);
        }
    }

    /// Adds a name to a comma-separated field, once.
    pub fn add_member(&mut self, position: usize, name: &str) {
        let members = self.field(position);
        if members.split(',').any(|member| member == name) {
            return;
        }
        let members = if members.is_empty() { name.to_owned() } else { format!("{members},{name}") };
        self.set(position, &members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_they_were() {
        let text = "root:x:0:0:root:/root:/bin/sh\n# odd\n+::::::\n\nweb:x:1:\n";
        assert_eq!(Table::parse(text).render(), text);
    }

    #[test]
    fn members_are_added_once() {
        let mut table = Table::parse("adm:x:4:\n");
        let row = table.get_mut("adm").expect("there");
        for name in ["web", "web", "we"] {
            row.add_member(3, name);
        }
        assert_eq!(table.render(), "adm:x:4:web,we\n");
        assert!(Table::parse("# adm\n").get("# adm").is_none());
    }
}
