//! Places in a source text.

/// A range of bytes in the source, `start` included and `end` not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub start: usize,
    pub end: usize,
}

impl Span {
    pub const fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// The smallest span that holds both.
    pub fn to(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

/// A line and a column, both counted from 1. A column counts characters (Unicode scalar values), not bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: u32,
    pub column: u32,
}

/// Finds the line and column of a byte offset.
pub struct LineIndex<'a> {
    source: &'a str,
    starts: Vec<usize>,
}

impl<'a> LineIndex<'a> {
    pub fn new(source: &'a str) -> Self {
        let starts = std::iter::once(0).chain(source.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { source, starts }
    }

    /// The position of `offset`; one beyond the end counts as the end.
    pub fn position(&self, offset: usize) -> Position {
        let offset = offset.min(self.source.len());
        let row = self.starts.partition_point(|start| *start <= offset).saturating_sub(1);
        let start = self.starts.get(row).copied().unwrap_or_default();
        // A byte order mark is no column: an editor does not show it either.
        let before = self.source.as_bytes().get(start..offset).unwrap_or_default();
        let before = if row == 0 { before.strip_prefix(BOM.as_bytes()).unwrap_or(before) } else { before };
        let column = before.iter().filter(|byte| !is_continuation(**byte)).count();
        Position { line: saturating(row + 1), column: saturating(column + 1) }
    }

    /// The text of a line, counted from 1, without its end.
    pub fn line(&self, number: u32) -> &'a str {
        let span = self.line_span(number);
        &self.source[span.start..span.end]
    }

    /// Where that text is.
    pub fn line_span(&self, number: u32) -> Span {
        let row = (number as usize).saturating_sub(1);
        let start = self.starts.get(row).copied().unwrap_or(self.source.len());
        let end = self.starts.get(row + 1).map_or(self.source.len(), |next| next - 1);
        let line = self.source[start..end].trim_end_matches('\r');
        let mark = if row == 0 && line.starts_with(BOM) { BOM.len() } else { 0 };
        Span::new(start + mark, start + line.len())
    }
}

/// The byte order mark that some editors put at the start of a file.
pub(crate) const BOM: &str = "\u{feff}";

/// Whether a byte of UTF-8 goes on with a character that an earlier byte began.
const fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

fn saturating(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_characters_from_one() {
        let index = LineIndex::new("\u{feff}NAME web\r\nRUN é x\n");
        assert_eq!(index.position(3), Position { line: 1, column: 1 });
        assert_eq!(index.position(8), Position { line: 1, column: 6 });
        assert_eq!(index.line(1), "NAME web");
        assert_eq!(index.line(2), "RUN é x");
        assert_eq!(index.position(20), Position { line: 2, column: 7 });
        assert_eq!(index.position(9999), Position { line: 3, column: 1 });
        assert_eq!(index.line(3), "");
        assert_eq!(index.line(400), "");
    }
}
