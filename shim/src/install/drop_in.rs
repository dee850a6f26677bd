//! Engines that read all TOML files of a folder: the registration is a file of its own there.

use std::{fmt::Display, path::PathBuf};

use toml::{Table, Value};

use super::{Action, Plan, block, change::Change, host::Host, registration::WRITTEN};
use crate::{
    error::{Error, Result},
    toml_text::parse,
};

/// A registration in a file of its own.
pub(super) struct DropIn<'a> {
    /// The file on the host.
    pub(super) path: PathBuf,
    /// Its text below the first line.
    pub(super) lines: String,
    /// Path of keys of the registration.
    pub(super) key: &'a [&'a str],
    /// Path of keys of the name of the default runtime.
    pub(super) default_key: &'a [&'a str],
    /// Other files that the engine reads, with their texts.
    pub(super) others: Vec<(PathBuf, String)>,
}

impl DropIn<'_> {
    /// The changes; an error if another file has the registration or needs it.
    pub(super) fn plan(self, host: &Host, action: Action) -> Result<Plan> {
        let own = host.read(&self.path)?;
        let is_own = own.as_ref().is_none_or(|text| text.starts_with(WRITTEN));
        let mut others = self.others;
        if let (Some(text), false) = (&own, is_own) {
            others.push((self.path.clone(), text.clone()));
        }
        let wanted: Table = parse(&self.lines, &self.path)?;
        let wanted = block::at(&wanted, self.key);
        match action {
            Action::Install => {
                if let Some(note) = registered(&others, self.key, wanted)? {
                    return Ok(Plan { changes: Vec::new(), note: Some(note) });
                }
            }
            Action::Uninstall => {
                for (path, text) in &others {
                    let table = parse(text, path)?;
                    refuse_others(&table, &path.display(), self.key)?;
                    refuse_default(&table, &path.display(), self.default_key, self.key.last())?;
                }
            }
        }
        if !is_own {
            return match action {
                Action::Uninstall => Ok(Plan::default()),
                Action::Install => Err(Error::new(format!(
                    "{} is not a file of `isopod install`",
                    self.path.display()
                ))),
            };
        }
        let after = (action == Action::Install).then(|| format!("{WRITTEN}{}", self.lines));
        let changes = Change::file(self.path, own, after).into_iter().collect();
        Ok(Plan { changes, note: None })
    }
}

/// Looks for the registration at `key` in files of others. Returns words for a person if one has it.
///
/// # Errors
///
/// If one has another registration there.
pub(super) fn registered(
    others: &[(PathBuf, String)],
    key: &[&str],
    wanted: Option<&Value>,
) -> Result<Option<String>> {
    for (path, text) in others {
        let table: Table = parse(text, path)?;
        let path = path.display();
        match block::at(&table, key) {
            None => {}
            Some(found) if same(found, wanted) => {
                return Ok(Some(format!("nothing to change: {path} has the runtime already")));
            }
            Some(_) => {
                return Err(Error::new(format!("{path} has {} with other values", key.join("."))));
            }
        }
    }
    Ok(None)
}

/// Refuses to remove a registration that `install` has not written.
pub(super) fn refuse_others(table: &Table, path: &impl Display, key: &[&str]) -> Result<()> {
    match block::at(table, key) {
        None => Ok(()),
        Some(_) => Err(Error::new(format!(
            "{path} has {}, which `isopod install` has not written: remove it there",
            key.join(".")
        ))),
    }
}

/// Refuses to remove a runtime that is the default of its engine: the engine would not start.
pub(super) fn refuse_default(
    table: &Table,
    path: &impl Display,
    key: &[&str],
    handler: Option<&&str>,
) -> Result<()> {
    let default = block::at(table, key).and_then(Value::as_str);
    if default.is_some() && default == handler.copied() {
        return Err(Error::new(format!(
            "{path} has it as {}: set another runtime there first",
            key.join(".")
        )));
    }
    Ok(())
}

/// Tells whether a registration is the wanted one, perhaps with further keys.
fn same(found: &Value, wanted: Option<&Value>) -> bool {
    match wanted {
        Some(Value::Table(wanted)) => block::has_all(found, wanted),
        wanted => Some(found) == wanted,
    }
}
