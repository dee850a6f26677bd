//! containerd: a handler of its plugin for Kubernetes. Its other clients find the shim by its name.
//!
//! A file of version 2 gets the lines at its end. containerd 1 takes a plugin's section from the
//! last imported file that has one, and drops all others: a file of its own would remove the host's
//! settings. From version 3 on the sections of all files are merged.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    Action, Plan, block,
    change::Change,
    drop_in::{DropIn, refuse_default, refuse_others, registered},
    host::Host,
    registration::{Registration, WRITTEN, quoted},
};
use crate::{
    error::{Error, Result},
    toml_text::parse,
};

/// The file that containerd reads.
const MAIN: &str = "/etc/containerd/config.toml";

/// Folder of the host's own files, if the file has no other.
const FOLDER: &str = "/etc/containerd/conf.d";

/// Type of the runtime, which gives the shim its name.
const RUNTIME_TYPE: &str = "io.containerd.isopod.v2";

/// Annotations of pods that containerd hands to the shim. The operator allows each one in the
/// settings, and the shim refuses the others by name.
const POD_ANNOTATIONS: &str = "dev.isopod.*";

/// First lines of a main file that `install` makes. All releases from 1.3 on read version 2.
const NEW_MAIN: &str =
    "# Written by `isopod install`, which removes the file if nothing is added.\nversion = 2\n";

/// Largest number of files that a configuration is read from.
const MAX_FILES: usize = 200;

/// Names of the plugin in the list of disabled plugins.
const PLUGIN_NAMES: [&str; 4] =
    ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1"];

/// A main file that is there.
struct Main {
    /// Text without the lines of `install`.
    rest: String,
    table: Table,
    version: i64,
}

pub(super) fn plan(host: &Host, registration: &Registration, action: Action) -> Result<Plan> {
    let text = host.read(Path::new(MAIN))?;
    match (action, text) {
        (Action::Install, text) => install(host, registration, text),
        (Action::Uninstall, Some(text)) => uninstall(host, registration, text),
        (Action::Uninstall, None) => Ok(Plan::default()),
    }
}

/// The file and the lines for an administrator.
pub(super) fn by_hand(host: &Host, registration: &Registration) -> (String, String) {
    let text = host.read(Path::new(MAIN)).ok().flatten();
    let main = text.and_then(|text| Main::parse(&text, registration).ok());
    // Version 1 is read by no release that takes version 2 as well, so its lines are no use.
    let version = main.map_or(2, |main| main.version.max(2));
    (format!("{MAIN} (version {version})"), lines(registration, version))
}

fn install(host: &Host, registration: &Registration, text: Option<String>) -> Result<Plan> {
    let handler = registration.handler.as_str();
    let Some(text) = text else {
        let after = block::add(NEW_MAIN, handler, &lines(registration, 2));
        return Ok(Plan::of(Change::file(MAIN, None, Some(after))));
    };
    let main = Main::parse(&text, registration)?;
    if main.is_disabled() {
        let note = format!(
            "nothing to change: {MAIN} disables the plugin for Kubernetes, and all other clients \
             find the shim by its name"
        );
        return Ok(Plan { changes: Vec::new(), note: Some(note) });
    }
    if !(2..=4).contains(&main.version) {
        return Err(Error::new(format!(
            "{MAIN} has version {}; versions 2 to 4 are known, and a file that names none has 1",
            main.version
        )));
    }
    let others = main.imported(host)?;
    let own_file = main.drop_in(registration);
    if main.version == 2 {
        for (path, text) in &others {
            if block::at(&parse(text, path)?, &["plugins", main.plugin()]).is_some() {
                return Err(Error::new(format!(
                    "{} has the section of the plugin for Kubernetes too, and containerd 1 reads \
                     one of them only",
                    path.display()
                )));
            }
        }
    }
    if let Some(path) = own_file {
        let mut others: Vec<_> = others.into_iter().filter(|(other, _)| *other != path).collect();
        others.insert(0, (MAIN.into(), main.rest.clone()));
        let key = main.key(handler);
        let drop_in = DropIn {
            path,
            lines: format!("version = {}\n\n{}", main.version, lines(registration, main.version)),
            key: &key,
            default_key: &main.default_key(),
            others,
        };
        let mut plan = drop_in.plan(host, Action::Install)?;
        // An earlier containerd may have had the lines in the main file.
        plan.changes.extend(Change::file(MAIN, Some(text), Some(main.rest)));
        return Ok(plan);
    }
    main.add(registration, text, &others)
}

fn uninstall(host: &Host, registration: &Registration, text: String) -> Result<Plan> {
    let handler = registration.handler.as_str();
    let rest = block::remove(&text, handler);
    let mut plan = Plan::default();
    let main = Main::parse(&text, registration)?;
    refuse_default(&main.table, &MAIN, &main.default_key(), Some(&handler))?;
    refuse_others(&main.table, &MAIN, &main.key(handler))?;
    let usual = Path::new(FOLDER).join(format!("{handler}.toml"));
    for path in BTreeSet::from([usual.clone(), main.drop_in(registration).unwrap_or(usual)]) {
        let before = host.read(&path)?.filter(|text| text.starts_with(WRITTEN));
        plan.changes.extend(Change::file(path, before, None));
    }
    let rest = (rest != NEW_MAIN).then_some(rest);
    plan.changes.extend(Change::file(MAIN, Some(text), rest));
    Ok(plan)
}

impl Main {
    fn parse(text: &str, registration: &Registration) -> Result<Self> {
        let rest = block::remove(text, &registration.handler);
        let table: Table = parse(&rest, Path::new(MAIN))?;
        let version = match table.get("version") {
            None => 1,
            Some(Value::Integer(version)) => *version,
            Some(_) => return Err(Error::new(format!("the version in {MAIN} is no number"))),
        };
        Ok(Self { rest, table, version })
    }

    fn plugin(&self) -> &'static str {
        plugin(self.version)
    }

    fn key<'a>(&self, handler: &'a str) -> [&'a str; 5] {
        ["plugins", self.plugin(), "containerd", "runtimes", handler]
    }

    fn default_key(&self) -> [&'static str; 4] {
        ["plugins", self.plugin(), "containerd", "default_runtime_name"]
    }

    fn strings(&self, key: &str) -> impl Iterator<Item = &str> {
        strings(&self.table, key)
    }

    fn is_disabled(&self) -> bool {
        self.strings("disabled_plugins").any(|name| PLUGIN_NAMES.contains(&name))
    }

    /// The file of its own that the main file imports, if the version lets it be.
    fn drop_in(&self, registration: &Registration) -> Option<PathBuf> {
        if self.version < 3 {
            return None;
        }
        let folder = self.strings("imports").find_map(|import| import.strip_suffix("/*.toml"))?;
        let folder = Path::new(MAIN).parent()?.join(folder);
        let plain = !folder.to_str()?.contains(['*', '?', '[', '\\']);
        plain.then(|| folder.join(format!("{}.toml", registration.handler)))
    }

    /// All files that this one imports, and those that they import.
    fn imported(&self, host: &Host) -> Result<Vec<(PathBuf, String)>> {
        let mut found: Vec<(PathBuf, String)> = Vec::new();
        let mut waiting = matches(host, Path::new(MAIN), &self.table)?;
        while let Some(path) = waiting.pop() {
            if path == Path::new(MAIN) || found.iter().any(|(other, _)| *other == path) {
                continue;
            }
            if found.len() >= MAX_FILES {
                return Err(Error::new(format!("{MAIN} imports more than {MAX_FILES} files")));
            }
            // containerd itself does not start without a file that is named.
            let Some(text) = host.read(&path)? else { continue };
            waiting.extend(matches(host, &path, &parse(&text, &path)?)?);
            found.push((path, text));
        }
        Ok(found)
    }

    /// Adds the lines to the end of the main file, unless a file has them.
    fn add(
        self,
        registration: &Registration,
        before: String,
        others: &[(PathBuf, String)],
    ) -> Result<Plan> {
        let key = self.key(&registration.handler);
        let lines = lines(registration, self.version);
        let wanted: Table = parse(&lines, Path::new(MAIN))?;
        let wanted = block::at(&wanted, &key);
        let files = [others, &[(MAIN.into(), self.rest.clone())]].concat();
        if let Some(note) = registered(&files, &key, wanted)? {
            return Ok(Plan { changes: Vec::new(), note: Some(note) });
        }
        let after = block::add(&self.rest, &registration.handler, &lines);
        let mut expected = self.table;
        let wanted = wanted.and_then(Value::as_table).cloned().unwrap_or_default();
        let fits = block::insert(&mut expected, &key, wanted);
        // An inline table cannot be extended.
        if !fits || parse(&after, Path::new(MAIN)).ok() != Some(expected) {
            return Err(Error::new(format!("{MAIN} takes no further table at its end")));
        }
        Ok(Plan::of(Change::file(MAIN, Some(before), Some(after))))
    }
}

/// Files that a file's imports name, in their order.
fn matches(host: &Host, of: &Path, table: &Table) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for import in strings(table, "imports") {
        // An absolute path replaces the folder.
        let path = of.parent().unwrap_or(Path::new("/")).join(import);
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { continue };
        let (folder_text, name) = (folder.to_string_lossy(), name.to_string_lossy());
        let wild = |text: &str| text.contains(['*', '?', '[', '\\']);
        match name.split_once('*') {
            _ if wild(&folder_text) => {}
            None if !wild(&name) => {
                found.push(path.clone());
                continue;
            }
            Some((begin, end)) if !wild(begin) && !wild(end) => {
                found.extend(host.list(folder, begin, end)?);
                continue;
            }
            _ => {}
        }
        return Err(Error::new(format!(
            "{} imports {import:?}, a pattern that is not known",
            of.display()
        )));
    }
    Ok(found)
}

/// The strings of a list.
fn strings<'a>(table: &'a Table, key: &str) -> impl Iterator<Item = &'a str> {
    table.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// The section of the plugin for Kubernetes.
fn plugin(version: i64) -> &'static str {
    if version <= 2 { "io.containerd.grpc.v1.cri" } else { "io.containerd.cri.v1.runtime" }
}

fn lines(registration: &Registration, version: i64) -> String {
    format!(
        "[plugins.{}.containerd.runtimes.{}]\n  runtime_type = {}\n  pod_annotations = [{}]\n",
        quoted(plugin(version)),
        registration.handler,
        quoted(RUNTIME_TYPE),
        quoted(POD_ANNOTATIONS),
    )
}
