//! What tables call VMs: by their names, and where two have one, with the digits of the UUID that
//! name the VM in other commands. A VM is its UUID.

use std::collections::{BTreeSet, HashMap};

use crate::vm::Uuid;

/// The VMs of a table by their names; all are added before any is called.
#[derive(Debug, Default)]
pub(crate) struct Names(HashMap<String, BTreeSet<Uuid>>);

impl Names {
    /// Those of a table's rows.
    pub(crate) fn among<'a>(vms: impl Iterator<Item = (&'a str, Uuid)>) -> Self {
        let mut names = Self::default();
        vms.for_each(|(name, uuid)| names.add(name, uuid));
        names
    }

    /// Adds a VM; again does not matter.
    pub(crate) fn add(&mut self, name: &str, uuid: Uuid) {
        match self.0.get_mut(name) {
            Some(uuids) => drop(uuids.insert(uuid)),
            None => drop(self.0.insert(name.to_owned(), BTreeSet::from([uuid]))),
        }
    }

    /// What VMs are called whose names are not theirs alone.
    pub(crate) fn told_apart(&self) -> impl Iterator<Item = String> {
        let shared = self.0.iter().filter(|(_, uuids)| uuids.len() > 1);
        shared.flat_map(|(name, uuids)| uuids.iter().map(move |uuid| with_digits(name, *uuid)))
    }

    /// What a VM is called.
    pub(crate) fn of(&self, name: &str, uuid: Uuid) -> String {
        match self.0.get(name) {
            Some(uuids) if uuids.len() > 1 => with_digits(name, uuid),
            _ => name.to_owned(),
        }
    }
}

fn with_digits(name: &str, uuid: Uuid) -> String {
    format!("{name} ({})", &uuid.to_string()[..8])
}
