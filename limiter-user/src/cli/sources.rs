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
    let rows = sources
        .iter()
        .map(|row| [row.service.clone(), row.source.clone(), row.connections.to_string(), limit(row.limit)]);
    table(["SERVICE", "SOURCE", "CONNECTIONS", "LIMIT"], &[2, 3], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_a_table_or_the_document_of_the_interface() {
        let sources =
            vec![SourceRow { service: "chat".into(), source: "192.0.2.7/32".into(), connections: 3, limit: 20 }];
        assert_eq!(
            text(&sources),
            "SERVICE  SOURCE        CONNECTIONS  LIMIT\nchat     192.0.2.7/32            3     20\n"
        );
        let document = serde_json::to_string(&Document { sources }).unwrap();
        assert_eq!(document, r#"{"sources":[{"service":"chat","source":"192.0.2.7/32","connections":3,"limit":20}]}"#);
    }
}
