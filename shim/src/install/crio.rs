//! CRI-O: a file in `crio.conf.d`, with a runtime of the type `vm`. CRI-O starts the shim for it.

use std::path::{Path, PathBuf};

use super::{
    Action, Plan,
    drop_in::DropIn,
    host::Host,
    registration::{Registration, quoted},
};
use crate::error::Result;

/// Folder of the host's own files. CRI-O reads all of them, whatever their names.
const FOLDER: &str = "/etc/crio/crio.conf.d";

/// The file that is read before those of the folder.
const MAIN: &str = "/etc/crio/crio.conf";

/// Directory for the fifos that CRI-O makes.
const RUNTIME_ROOT: &str = "/run/isopod/crio";

pub(super) fn plan(host: &Host, registration: &Registration, action: Action) -> Result<Plan> {
    let path = Path::new(FOLDER).join(format!("{}.conf", registration.handler));
    let files = host.list(Path::new(FOLDER), "", "")?;
    let files = [PathBuf::from(MAIN)].into_iter().chain(files).filter(|file| *file != path);
    let drop_in = DropIn {
        lines: lines(registration),
        key: &["crio", "runtime", "runtimes", &registration.handler],
        default_key: &["crio", "runtime", "default_runtime"],
        others: host.read_all(files)?,
        path,
    };
    drop_in.plan(host, action)
}

/// The file and the lines for an administrator.
pub(super) fn by_hand(registration: &Registration) -> (String, String) {
    (MAIN.to_owned(), lines(registration))
}

fn lines(registration: &Registration) -> String {
    let shim = quoted(&registration.shim().to_string_lossy());
    format!(
        "[crio.runtime.runtimes.{}]\nruntime_path = {shim}\nruntime_type = \"vm\"\n\
         runtime_root = \"{RUNTIME_ROOT}\"\n",
        registration.handler
    )
}
