//! Podman: a file in `containers.conf.d`, which Podman reads from version 3 on.

use std::path::{Path, PathBuf};

use super::{
    Action, Plan,
    drop_in::DropIn,
    host::Host,
    registration::{Registration, quoted},
};
use crate::error::Result;

/// Folder of the host's own files.
const FOLDER: &str = "/etc/containers/containers.conf.d";

/// Files that are read before those of the folder.
const MAIN: [&str; 2] =
    ["/usr/share/containers/containers.conf", "/etc/containers/containers.conf"];

pub(super) fn plan(host: &Host, registration: &Registration, action: Action) -> Result<Plan> {
    let path = Path::new(FOLDER).join(format!("{}.conf", registration.handler));
    let files = host.list(Path::new(FOLDER), "", ".conf")?;
    let files = MAIN.map(PathBuf::from).into_iter().chain(files).filter(|file| *file != path);
    let drop_in = DropIn {
        lines: lines(registration),
        key: &["engine", "runtimes", &registration.handler],
        default_key: &["engine", "runtime"],
        others: host.read_all(files)?,
        path,
    };
    drop_in.plan(host, action)
}

/// The file and the lines for an administrator.
pub(super) fn by_hand(registration: &Registration) -> (String, String) {
    ("/etc/containers/containers.conf".to_owned(), lines(registration))
}

fn lines(registration: &Registration) -> String {
    let Registration { handler, program } = registration;
    format!("[engine.runtimes]\n{handler} = [{}]\n", quoted(program))
}
