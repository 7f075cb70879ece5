//! Each answer that a client can get, with a row of its own: how it comes about, and what the client sees of it to the last byte.
//!
//! A kind of refusal or of end that is added to the code does not compile here before it has a name in a list, and the test of
//! the list does not pass before the name has a row.

mod closes;
mod refusals;

use std::collections::BTreeSet;

/// The names of every kind of a type, in a match that leaves none out.
macro_rules! names {
    ($type:ty { $($kind:pat => $name:literal),+ $(,)? }) => {{
        const _: fn(&$type) -> &'static str = |kind| match kind { $($kind => $name),+ };
        [$($name),+]
    }};
}
use names;

/// Checks that each name has a row, and each row a name.
fn assert_each_has_a_row(names: &[&'static str], rows: impl IntoIterator<Item = &'static str>) {
    let names: BTreeSet<_> = names.iter().copied().collect();
    let rows: BTreeSet<_> = rows.into_iter().collect();
    let without: Vec<_> = names.difference(&rows).collect();
    assert!(without.is_empty(), "without a row: {without:?}");
    let unknown: Vec<_> = rows.difference(&names).collect();
    assert!(unknown.is_empty(), "rows of nothing that there is: {unknown:?}");
}
