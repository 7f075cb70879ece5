//! Reading a table key by key: what is asked for is known, what is left over is refused.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::error::{Place, Problem};

/// A value of the file.
pub(super) type Item<'i> = Spanned<DeValue<'i>>;

/// What is wrong with a value, and at which bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) span: Range<usize>,
    pub(super) message: String,
}

impl Fault {
    pub(super) fn new(item: &Item, message: impl Into<String>) -> Self {
        Self { span: item.span(), message: message.into() }
    }
}

/// Collects what is wrong with one file, and the names of the keys that were asked for.
pub(super) struct Report<'t> {
    file: PathBuf,
    text: &'t str,
    found: RefCell<Vec<(usize, String)>>,
    keys: RefCell<BTreeSet<String>>,
}

impl<'t> Report<'t> {
    pub(super) fn new(file: &Path, text: &'t str) -> Self {
        Self { file: file.to_owned(), text, found: RefCell::default(), keys: RefCell::default() }
    }

    pub(super) fn add(&self, span: &Range<usize>, message: impl Into<String>) {
        self.found.borrow_mut().push((span.start, message.into()));
    }

    /// The line of a byte, from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        super::error::line_and_column(self.text, offset).0
    }

    /// Every key that was asked for, in full: `kernel.pin_path`.
    #[cfg(test)]
    pub(super) fn keys(&self) -> BTreeSet<String> {
        self.keys.borrow().clone()
    }

    /// What was found, in the order of the file.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut found = self.found.borrow().clone();
        found.sort();
        found
            .into_iter()
            .map(|(offset, message)| Problem { place: Some(Place::of(self.file.clone(), self.text, offset)), message })
            .collect()
    }
}

/// A table of the file, or the lack of one.
pub(super) struct Section<'r, 'i> {
    report: &'r Report<'r>,
    path: String,
    table: Option<&'r DeTable<'i>>,
    known: Vec<&'static str>,
}

impl<'r, 'i> Section<'r, 'i> {
    pub(super) fn root(report: &'r Report<'r>, table: &'r DeTable<'i>) -> Self {
        Self { report, path: String::new(), table: Some(table), known: Vec::new() }
    }

    /// The value of `key`, if it is there.
    pub(super) fn item(&mut self, key: &'static str) -> Option<&'r Item<'i>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.report.keys.borrow_mut().insert(self.name(key));
        self.table.and_then(|table| table.get(key))
    }

    /// Puts the value of `key` into `target`. A key that is not there, or is wrong, leaves `target` as it is. Gives the
    /// bytes of a good value.
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        target: &mut T,
        convert: impl FnOnce(&Item) -> Result<T, Fault>,
    ) -> Option<Range<usize>> {
        let item = self.item(key)?;
        match convert(item) {
            Ok(value) => {
                *target = value;
                Some(item.span())
            }
            Err(fault) => {
                self.report.add(&fault.span, format!("{}: {}", self.name(key), fault.message));
                None
            }
        }
    }

    /// Says what is wrong with the value of `key`, given what else is in the file.
    pub(super) fn complain(&self, span: &Range<usize>, key: &str, message: &str) {
        self.report.add(span, format!("{}: {message}", self.name(key)));
    }

    /// The table of that name; an empty one if it is not there.
    pub(super) fn section(&mut self, key: &'static str) -> Self {
        let item = self.item(key);
        self.child(key, item)
    }

    /// The tables of that name (`[[key]]`), each with its bytes.
    pub(super) fn sections(&mut self, key: &'static str) -> Vec<(Range<usize>, Self)> {
        let Some(item) = self.item(key) else { return Vec::new() };
        let Some(array) = item.get_ref().as_array() else {
            let found = super::value::kind(item);
            self.report.add(&item.span(), format!("{key}: found {found}, expected tables, each under [[{key}]]"));
            return Vec::new();
        };
        let sections = array.iter().map(|item| (item.span(), self.child(key, Some(item))));
        sections.filter(|(_, section)| section.table.is_some()).collect()
    }

    /// Refuses the keys that nobody asked for.
    pub(super) fn finish(self) {
        for key in self.table.into_iter().flat_map(DeTable::keys) {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let advice = match nearest(name, &self.known) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("known here: {}", self.known.join(", ")),
            };
            self.report.add(&key.span(), format!("unknown key {}; {advice}", self.name(name)));
        }
    }

    fn child(&self, key: &str, item: Option<&'r Item<'i>>) -> Self {
        let table = item.and_then(|item| item.get_ref().as_table());
        if let (Some(item), None) = (item, table) {
            let found = super::value::kind(item);
            self.report.add(&item.span(), format!("{}: found {found}, expected a table", self.name(key)));
        }
        Self { report: self.report, path: self.name(key), table, known: Vec::new() }
    }

    fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// The candidate that `word` was probably meant to be.
pub(super) fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let word = word.to_lowercase();
    candidates
        .iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(&word, candidate), *candidate))
        .filter(|(likeness, _)| *likeness >= 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
