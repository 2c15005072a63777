//! Plain text tables: columns as wide as their widest cell, numbers to the right.
//!
//! Only used by the human side of outputs; machines get JSON.

/// A table being filled row by row.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

#[derive(Debug)]
struct Column {
    head: &'static str,
    right: bool,
}

impl Table {
    /// A table with these column heads; a head that begins with `>` aligns its column right.
    pub(crate) fn new(heads: &[&'static str]) -> Self {
        let columns = heads
            .iter()
            .map(|head| match head.strip_prefix('>') {
                Some(head) => Column { head, right: true },
                None => Column { head, right: false },
            })
            .collect();
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When it has not as many cells as the table has columns.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.columns.len(), "a row has as many cells as there are columns");
        self.rows.push(cells);
    }

    /// Whether it has no row.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The text, a line per row, each ended by a line feed, nothing trailing.
    pub(crate) fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|n| {
                let cells = self.rows.iter().map(|row| row[n].chars().count());
                cells.chain([self.columns[n].head.chars().count()]).max().unwrap_or(0)
            })
            .collect();
        let head: Vec<&str> = self.columns.iter().map(|column| column.head).collect();
        let mut out = self.line(&head, &widths);
        for row in &self.rows {
            let cells: Vec<&str> = row.iter().map(String::as_str).collect();
            out.push_str(&self.line(&cells, &widths));
        }
        out
    }

    fn line(&self, cells: &[&str], widths: &[usize]) -> String {
        let mut line = String::new();
        for ((cell, width), column) in cells.iter().zip(widths).zip(&self.columns) {
            let padding = " ".repeat(width - cell.chars().count());
            if column.right {
                line.push_str(&padding);
                line.push_str(cell);
            } else {
                line.push_str(cell);
                line.push_str(&padding);
            }
            line.push_str("  ");
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
