//! Tables as Markdown, to be pasted into the documentation.

/// Prints a heading, how it was measured, and rows under the names of their columns.
pub fn print(heading: &str, how: &str, columns: &[&str], rows: &[Vec<String>]) {
    println!("## {heading}\n\n{how}\n");
    println!("| {} |", columns.join(" | "));
    println!("|{}", " --- |".repeat(columns.len()));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
    println!();
}
