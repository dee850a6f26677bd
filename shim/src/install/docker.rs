//! Docker: a member of `runtimes` in `daemon.json`.
//!
//! The member has the program's path: all releases from 20.10 on take it, and the daemon needs
//! nothing in its `PATH`.

use std::path::Path;

use serde_json::Value;

use super::{
    Action, Plan,
    change::Change,
    host::Host,
    json_members::Members,
    registration::{Registration, quoted},
};
use crate::error::{Error, Explain, Result};

/// The daemon's file.
const FILE: &str = "/etc/docker/daemon.json";

/// The member of the file with all runtimes.
const RUNTIMES: &str = "runtimes";

/// The member of the file with the name of the default runtime.
const DEFAULT: &str = "default-runtime";

pub(super) fn plan(host: &Host, registration: &Registration, action: Action) -> Result<Plan> {
    let before = host.read(Path::new(FILE))?;
    let after = match (&before, action) {
        (None, Action::Install) => Some(new_file(registration)),
        (None, Action::Uninstall) => None,
        (Some(text), Action::Install) => Some(with(text, registration)?),
        (Some(text), Action::Uninstall) if *text == new_file(registration) => None,
        (Some(text), Action::Uninstall) => Some(without(text, registration)?),
    };
    Ok(Plan::of(Change::file(FILE, before, after)))
}

/// The file and the lines for an administrator.
pub(super) fn by_hand(registration: &Registration) -> (String, String) {
    (FILE.to_owned(), new_file(registration))
}

/// The file if there is none.
fn new_file(registration: &Registration) -> String {
    format!("{{\n    \"{RUNTIMES}\": {}\n}}\n", table(registration))
}

/// The object of all runtimes, if there is no other. Its blanks tell it from one that was there.
fn table(registration: &Registration) -> String {
    format!("{{ {} }}", member(registration))
}

fn member(registration: &Registration) -> String {
    let Registration { handler, program } = registration;
    format!("\"{handler}\": {{ \"path\": {} }}", quoted(program))
}

/// The text with the runtime.
fn with(text: &str, registration: &Registration) -> Result<String> {
    let whole = whole(text)?;
    let Some(runtimes) = runtimes(&whole, text)? else {
        return Ok(whole.with_first(&format!("\"{RUNTIMES}\": {}", table(registration))));
    };
    match runtime(&runtimes, registration)? {
        None => Ok(runtimes.with_first(&member(registration))),
        Some(found) if has_path(&found, registration) => Ok(text.to_owned()),
        Some(_) => Err(Error::new(format!(
            "{FILE} has {RUNTIMES}.{} with other values",
            registration.handler
        ))),
    }
}

/// The text without the runtime.
fn without(text: &str, registration: &Registration) -> Result<String> {
    let handler = &registration.handler;
    let whole = whole(text)?;
    let Some(runtimes) = runtimes(&whole, text)? else { return Ok(text.to_owned()) };
    let Some(found) = runtime(&runtimes, registration)? else { return Ok(text.to_owned()) };
    if found.as_object().is_none_or(|found| found.len() != 1) || !has_path(&found, registration) {
        return Err(Error::new(format!(
            "{FILE} has {RUNTIMES}.{handler}, which `isopod install` has not written: remove it \
             there"
        )));
    }
    let default = whole.value(DEFAULT).map(serde_json::from_str::<Value>).transpose();
    if default.explain(|| FILE.into())?.is_some_and(|default| default == handler.as_str()) {
        return Err(Error::new(format!(
            "{FILE} has it as {DEFAULT}: set another runtime there first"
        )));
    }
    if whole.value(RUNTIMES) == Some(&table(registration)) {
        return Ok(whole.without(RUNTIMES));
    }
    Ok(runtimes.without(handler))
}

fn whole(text: &str) -> Result<Members<'_>> {
    Members::of_text(text).explain(|| format!("{FILE} is no JSON object"))
}

/// The object of all runtimes. None if the file has none.
fn runtimes<'a>(whole: &Members<'a>, text: &'a str) -> Result<Option<Members<'a>>> {
    let Some(value) = whole.value(RUNTIMES) else {
        if whole.has(RUNTIMES) {
            return Err(Error::new(format!("{FILE} has {RUNTIMES} twice")));
        }
        return Ok(None);
    };
    Members::of(text, value).map(Some).explain(|| format!("{RUNTIMES} in {FILE} is no object"))
}

/// The registered runtime of this name.
fn runtime(runtimes: &Members<'_>, registration: &Registration) -> Result<Option<Value>> {
    let handler = &registration.handler;
    match runtimes.value(handler) {
        Some(value) => serde_json::from_str(value).map(Some).explain(|| FILE.into()),
        None if runtimes.has(handler) => {
            Err(Error::new(format!("{FILE} has {RUNTIMES}.{handler} twice")))
        }
        None => Ok(None),
    }
}

fn has_path(runtime: &Value, registration: &Registration) -> bool {
    runtime.get("path").and_then(Value::as_str) == Some(&registration.program)
}
