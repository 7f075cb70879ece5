//! What goes to stdout: a table for people, or a document for programs.

use std::io::{self, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::{kernel::ServiceRow, policy::Limits};

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
    rate_of(limits.connection_rate, limits.connection_burst)
}

/// The connection rate of the whole service for people.
pub(super) fn service_rate(limits: &Limits) -> String {
    rate_of(limits.service_connection_rate, limits.service_connection_burst)
}

fn rate_of(rate: u32, burst: u32) -> String {
    if rate == 0 { "unlimited".to_owned() } else { format!("{rate}/s, {burst} at once") }
}

/// How many connections a source may hold, and one of the wider tier if there is one.
pub(super) fn per_source(limits: &Limits) -> String {
    let narrow = limit(limits.connections_per_source);
    if limits.wide_ipv4_prefix == 0 && limits.wide_ipv6_prefix == 0 {
        return narrow;
    }
    format!("{narrow}, wide {}", limit(limits.connections_per_wide_source))
}

/// What a source is.
pub(super) fn sources_are(limits: &Limits) -> String {
    let narrow = format!("/{} and /{}", limits.ipv4_prefix, limits.ipv6_prefix);
    match (limits.wide_ipv4_prefix, limits.wide_ipv6_prefix) {
        (0, 0) => narrow,
        (v4, 0) => format!("{narrow}, wide /{v4} (IPv4)"),
        (0, v6) => format!("{narrow}, wide /{v6} (IPv6)"),
        (v4, v6) => format!("{narrow}, wide /{v4} and /{v6}"),
    }
}

/// Ports, separated by commas.
pub(super) fn ports(ports: &[u16]) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The ports of a service, and where its sockets are if that is not there.
pub(super) fn places(service: &ServiceRow) -> String {
    let ports = ports(&service.ports);
    if service.has_sockets_elsewhere() { format!("{ports}; {}", sockets(service)) } else { ports }
}

/// Where the sockets of a service are.
pub(super) fn sockets(service: &ServiceRow) -> String {
    let namespaces = match service.namespaces {
        "others" => "other namespaces",
        "all" => "every namespace",
        _ => "this namespace",
    };
    format!("sockets at {} in {namespaces}", ports(&service.socket_ports))
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
    fn a_wider_source_is_shown_where_there_is_one() {
        let limits = Limits::default();
        assert_eq!((per_source(&limits), sources_are(&limits)), ("20".to_owned(), "/32 and /64".to_owned()));
        let limits = Limits { wide_ipv4_prefix: 24, connections_per_wide_source: 100, ..limits };
        let shown = ("20, wide 100".to_owned(), "/32 and /64, wide /24 (IPv4)".to_owned());
        assert_eq!((per_source(&limits), sources_are(&limits)), shown);
    }

    #[test]
    fn a_name_does_not_steer_the_terminal() {
        let text = table(["NAME"], &[], [["\u{1b}[2Jx".to_owned()]]);
        assert_eq!(text, "NAME\n\u{fffd}[2Jx\n");
    }
}
