//! Tables that stay readable when the terminal is narrow.

use comfy_table::{Cell, ContentArrangement, Table as Grid, presets};

use super::printable;

#[derive(Debug)]
struct Column {
    title: &'static str,
    /// Shown with `-o wide` alone.
    wide: bool,
}

/// Rows of one kind of thing. The first column is its name.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// `wide` columns follow the `usual` ones and are shown with `-o wide` alone.
    pub fn new(usual: &[&'static str], wide: &[&'static str]) -> Self {
        let columns = usual.iter().map(|title| Column { title, wide: false }).chain(wide.iter().map(|title| Column { title, wide: true }));
        Self { columns: columns.collect(), rows: Vec::new() }
    }

    /// One cell a column, in their order.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len());
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    pub fn names(&self) -> String {
        self.rows.iter().filter_map(|row| row.first()).map(|name| format!("{name}\n")).collect()
    }

    /// As columns; where those do not fit into `width`, each row as a block of lines.
    pub fn render(&self, wide: bool, header: bool, width: Option<usize>) -> String {
        let shown: Vec<usize> = (0..self.columns.len()).filter(|index| wide || !self.columns[*index].wide).collect();
        let text = self.grid(&shown, header);
        let natural = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        match width {
            Some(width) if natural > width => self.blocks(&shown),
            _ => text,
        }
    }

    fn grid(&self, shown: &[usize], header: bool) -> String {
        let mut grid = Grid::new();
        grid.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if header {
            grid.set_header(shown.iter().map(|index| Cell::new(self.columns[*index].title)));
        }
        for row in &self.rows {
            grid.add_row(shown.iter().map(|index| row.get(*index).map_or("", String::as_str)));
        }
        for column in grid.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let text: String = grid.lines().map(|line| format!("{}\n", line.trim_end())).collect();
        if self.rows.is_empty() && !header { String::new() } else { text }
    }

    fn blocks(&self, shown: &[usize]) -> String {
        let indent = shown.iter().skip(1).map(|index| self.columns[*index].title.len()).max().unwrap_or(0);
        let mut text = String::new();
        for row in &self.rows {
            for (place, index) in shown.iter().enumerate() {
                let (title, cell) = (self.columns[*index].title.to_lowercase(), row.get(*index).map_or("", String::as_str));
                match place {
                    0 => text.push_str(&format!("{cell}\n")),
                    _ if cell.is_empty() => {}
                    _ => text.push_str(&format!("  {title:indent$}  {cell}\n")),
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["NAME", "STATE", "PORTS"], &["ID"]);
        table.row(["web", "running", "8080:80, 9090:90", "0123"].map(str::to_owned));
        table.row(["a-longer-name", "stopped", "", "4567"].map(str::to_owned));
        table
    }

    #[test]
    fn columns_without_trailing_blanks() {
        let expected = "NAME           STATE    PORTS\nweb            running  8080:80, 9090:90\na-longer-name  stopped\n";
        assert_eq!(table().render(false, true, None), expected);
        assert_eq!(table().render(false, true, Some(40)), expected);
        assert!(table().render(true, false, None).starts_with("web "));
        assert!(table().render(true, true, None).contains("ID"));
    }

    #[test]
    fn a_narrow_terminal_gets_blocks() {
        let expected = "web\n  state  running\n  ports  8080:80, 9090:90\na-longer-name\n  state  stopped\n";
        assert_eq!(table().render(false, true, Some(39)), expected);
    }

    #[test]
    fn nothing_is_a_header_alone() {
        let empty = Table::new(&["NAME"], &[]);
        assert_eq!((empty.render(false, true, None).as_str(), empty.render(false, false, None).as_str()), ("NAME\n", ""));
        assert_eq!(table().names(), "web\na-longer-name\n");
    }
}
