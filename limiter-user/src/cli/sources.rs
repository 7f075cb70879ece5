//! `limiter sources`.

use serde::Serialize;

use super::{
    Global,
    output::{Format, limit, table},
};
use crate::kernel::{Pinned, SourceRow};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only the N sources with most connections
    #[arg(long, value_name = "N")]
    top: Option<usize>,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Document {
    sources: Vec<SourceRow>,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let mut sources = Pinned::open(&global.pin_path()?)?.sources()?;
    sources.truncate(args.top.unwrap_or(usize::MAX));
    let document = Document { sources };
    args.format.print(&document, || text(&document.sources))
}

fn text(sources: &[SourceRow]) -> String {
    let rows = sources.iter().map(|row| {
        [row.service.clone(), row.source.clone(), row.tier.to_owned(), row.connections.to_string(), limits(row)]
    });
    table(["SERVICE", "SOURCE", "TIER", "CONNECTIONS", "LIMIT"], &[3, 4], rows)
}

/// The limit, and what rules say for parts of the source.
fn limits(row: &SourceRow) -> String {
    let usual = limit(row.limit);
    match &row.exceptions[..] {
        [] => usual,
        [one] => format!("{usual} ({} for {})", limit(one.limit), one.cidr),
        more => format!("{usual} (others for {} prefixes in it)", more.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Exception;

    #[test]
    fn sources_are_a_table_or_the_document_of_the_interface() {
        let row = |source: &str, tier, exceptions| SourceRow {
            service: "chat".into(),
            source: source.into(),
            tier,
            connections: 3,
            limit: 20,
            exceptions,
        };
        let exception = Exception { cidr: "192.0.2.9/32".into(), limit: 0 };
        let sources = vec![row("192.0.2.7/32", "narrow", vec![]), row("192.0.2.0/24", "wide", vec![exception])];
        let expected = "\
SERVICE  SOURCE        TIER    CONNECTIONS                            LIMIT
chat     192.0.2.7/32  narrow            3                               20
chat     192.0.2.0/24  wide              3  20 (unlimited for 192.0.2.9/32)
";
        assert_eq!(text(&sources), expected);
        let document = serde_json::to_value(Document { sources }).unwrap();
        let narrow = serde_json::json!({
            "service": "chat", "source": "192.0.2.7/32", "tier": "narrow", "connections": 3, "limit": 20
        });
        assert_eq!(document["sources"][0], narrow);
        assert_eq!(document["sources"][1]["exceptions"][0]["cidr"], "192.0.2.9/32");
    }
}
