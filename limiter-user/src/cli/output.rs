//! What goes to stdout: a table for people, or a document for programs.

use std::io::{self, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::policy::Limits;

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(super) struct Format {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Format {
    /// Prints the document, or the text that says the same for people.
    pub(super) fn print<T: Serialize>(self, document: &T, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            let mut document = serde_json::to_string_pretty(document)?;
            document.push('\n');
            print(&document)
        } else {
            print(&text())
        }
    }
}

/// Writes to the standard output. A reader who has gone is an `io::Error` of the kind `BrokenPipe`.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// A table without borders. `numbers`: the columns that are aligned to the right.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    numbers: &[usize],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row.map(|cell| printable(&cell)));
    }
    for (place, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if numbers.contains(&place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// A limit for people: 0 stands for none.
pub(super) fn limit(limit: u32) -> String {
    if limit == 0 { "unlimited".to_owned() } else { limit.to_string() }
}

/// A connection rate for people.
pub(super) fn rate(limits: &Limits) -> String {
    if limits.connection_rate == 0 {
        "unlimited".to_owned()
    } else {
        format!("{}/s, {} at once", limits.connection_rate, limits.connection_burst)
    }
}

/// Ports, separated by commas.
pub(super) fn ports(ports: &[u16]) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Names come from files and maps: nothing in them may steer the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_borders_and_no_spaces_at_the_end_of_a_line() {
        let text = table(["NAME", "COUNT"], &[1], [["a".into(), "7".into()], ["long name".into(), "1000".into()]]);
        assert_eq!(text, "NAME       COUNT\na              7\nlong name   1000\n");
    }

    #[test]
    fn a_name_does_not_steer_the_terminal() {
        let text = table(["NAME"], &[], [["\u{1b}[2Jx".to_owned()]]);
        assert_eq!(text, "NAME\n\u{fffd}[2Jx\n");
    }
}
