//! What a reconciliation found, one line per thing: undone, or only looked at.

use std::fmt;

use serde::Serialize;

/// Whether things are undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// They are.
    Undo,
    /// They are told of, and nothing is changed.
    Look,
}

/// What becomes of a thing that was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It is gone, or as it was before.
    Undone,
    /// It stays: it belongs to something that exists.
    Adopted,
    /// It stays, because it cannot be told or undone now.
    Kept,
}

/// One thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What becomes of it.
    pub action: Action,
    /// What it is, and of which VM.
    pub what: String,
}

/// A reconciliation under way.
#[derive(Debug)]
pub struct Recovery {
    mode: Mode,
    items: Vec<Item>,
}

impl Recovery {
    /// One that has found nothing yet.
    pub fn new(mode: Mode) -> Self {
        Self { mode, items: Vec::new() }
    }

    /// Notes something to undo; whether it is to be undone now.
    pub fn undo(&mut self, what: impl Into<String>) -> bool {
        self.note(Action::Undone, what);
        self.mode == Mode::Undo
    }

    /// Says that what was noted last was to be undone and was not: it stays.
    pub fn stays(&mut self, why: impl fmt::Display) {
        let item = self.items.last_mut().expect("something was noted");
        item.action = Action::Kept;
        item.what = format!("{}: {why}", item.what);
    }

    /// Notes something.
    pub fn note(&mut self, action: Action, what: impl Into<String>) {
        self.items.push(Item { action, what: what.into() });
    }

    /// Adds what another one found.
    pub fn add(&mut self, other: Self) {
        self.items.extend(other.items);
    }

    /// Whether things are undone.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether things are changed at all.
    pub fn changes(&self) -> bool {
        self.mode == Mode::Undo
    }

    /// What was found.
    pub fn into_items(self) -> Vec<Item> {
        self.items
    }
}
