//! Plain text tables: columns as wide as their widest cell, numbers to the right.
//!
//! Only used by the human side of outputs; machines get JSON.

use super::text::shown;

/// A table being filled row by row.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Columns,
    rows: Vec<Vec<String>>,
}

/// The columns of a table whose rows are not held: each row is measured first, and made a line when
/// all were.
#[derive(Debug)]
pub(crate) struct Columns(Vec<Column>);

#[derive(Debug)]
struct Column {
    head: &'static str,
    right: bool,
    width: usize,
}

impl Columns {
    /// Columns with these heads; a head that begins with `>` aligns its column right.
    pub(crate) fn new(heads: &[&'static str]) -> Self {
        let column = |head: &&'static str| {
            let name = head.strip_prefix('>');
            let (head, right) = (name.unwrap_or(head), name.is_some());
            Column { head, right, width: head.chars().count() }
        };
        Self(heads.iter().map(column).collect())
    }

    /// Makes the columns as wide as the cells of this row.
    ///
    /// # Panics
    /// When it has not as many cells as there are columns.
    pub(crate) fn measure(&mut self, cells: &[String]) {
        assert_eq!(cells.len(), self.0.len(), "a row has as many cells as there are columns");
        for (column, cell) in self.0.iter_mut().zip(cells) {
            column.width = column.width.max(shown(cell).chars().count());
        }
    }

    /// The line with the heads.
    pub(crate) fn head(&self) -> String {
        self.join(self.0.iter().map(|column| column.head))
    }

    /// The line of a row that was measured.
    pub(crate) fn line(&self, cells: &[String]) -> String {
        self.join(cells.iter().map(String::as_str))
    }

    fn join<'a>(&self, cells: impl Iterator<Item = &'a str>) -> String {
        let mut line = String::new();
        for (cell, column) in cells.map(shown).zip(&self.0) {
            let padding = " ".repeat(column.width.saturating_sub(cell.chars().count()));
            if column.right {
                line.push_str(&padding);
                line.push_str(&cell);
            } else {
                line.push_str(&cell);
                line.push_str(&padding);
            }
            line.push_str("  ");
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

impl Table {
    /// A table with these column heads; a head that begins with `>` aligns its column right.
    pub(crate) fn new(heads: &[&'static str]) -> Self {
        Self { columns: Columns::new(heads), rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When it has not as many cells as the table has columns.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        self.columns.measure(&cells);
        self.rows.push(cells);
    }

    /// The text, a line per row, each ended by a line feed, nothing trailing.
    pub(crate) fn render(&self) -> String {
        let lines = self.rows.iter().map(|row| self.columns.line(row));
        std::iter::once(self.columns.head()).chain(lines).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_stays_on_its_line() {
        let mut table = Table::new(&["VM"]);
        table.row(["a\nb\u{1b}[2J".into()]);
        assert_eq!(table.render(), "VM\na\\u{a}b\\u{1b}[2J\n");
    }

    #[test]
    fn columns_align_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new(&["disk", ">size", "why"]);
        table.row(["vda".into(), "10.0 GiB".into(), String::new()]);
        table.row(["sdab".into(), "1 B".into(), "new disk".into()]);
        assert_eq!(
            table.render(),
            "disk      size  why\nvda   10.0 GiB\nsdab       1 B  new disk\n"
        );
    }
}
