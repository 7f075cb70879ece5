//! Who was there before this process, and what is kept for who comes after it.

use anyhow::Context as _;

use super::{Attempt, LONGEST_START, Offer, Program, inheritance::Predecessor};
use crate::{
    gateway::{Handed, Spare},
    kernel::Attached,
};

/// The place of this process in the row of those that hand over to each other.
#[derive(Debug)]
pub(in crate::cli::run) struct Succession {
    program: Program,
    offer: Offer,
    predecessor: Option<Predecessor>,
    /// What was handed over and is not wanted any more. It is kept until this process has taken over.
    unwanted: Vec<Handed>,
}

impl Succession {
    /// `handed`: what is left of it.
    pub(in crate::cli::run) fn new(program: Program, predecessor: Option<Predecessor>, handed: Handed) -> Self {
        Self { program, offer: Offer::default(), predecessor, unwanted: vec![handed] }
    }

    /// Keeps these for the next process.
    pub(in crate::cli::run) fn keep_sockets(&mut self, sockets: Vec<Spare>) {
        self.offer.sockets = sockets;
    }

    /// The same of the admin address. `handed`: what is left of it.
    pub(in crate::cli::run) fn keep_admin(&mut self, socket: Option<Spare>, handed: Handed) {
        self.offer.admin = socket;
        self.unwanted.push(handed);
    }

    /// Waits until this process is to serve, if there is one before it, and takes over from that one what belongs to one of them only.
    pub(in crate::cli::run) async fn begin(&mut self, attached: Option<&Attached>) {
        let Some(predecessor) = self.predecessor.take() else { return };
        let before = predecessor.relieve().await;
        self.offer.all().for_each(Spare::claim);
        for place in self.unwanted.drain(..).flat_map(Handed::close) {
            tracing::info!(place, "not listening there any longer");
        }
        if let Some(Err(error)) = attached.map(Attached::claim_lock) {
            tracing::warn!(%error, "the lock of the pin path goes on being shown as the process before's");
        }
        tracing::info!(before, "took over from the process before");
    }

    /// Starts the process that is to come after this one.
    pub(in crate::cli::run) fn start_next(&self, attached: Option<&Attached>) -> anyhow::Result<Attempt> {
        let lock = attached.map(Attached::share_lock).transpose().context("can't share the lock of the pin path")?;
        Attempt::start(&self.program, &self.offer, lock.as_ref(), LONGEST_START)
    }

    /// What goes with the sockets is the next process's from now on.
    pub(in crate::cli::run) fn leave(self) {
        self.offer.all().for_each(Spare::leave);
    }
}
