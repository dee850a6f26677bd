//! Containers that run on the host, by its process table: engines have state directories anywhere.

use std::fs;

use super::{host::Host, registration::SHIM};
use crate::error::{Explain, Result};

/// Names of the running containers, sorted. A pod of containerd is named by its first container.
pub(super) fn containers(host: &Host) -> Result<Vec<String>> {
    let Some(proc) = host.find("/proc".as_ref())? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::read_dir(&proc).explain(|| "cannot list /proc".into())? {
        let Ok(entry) = entry else { continue };
        if !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // A process may end meanwhile.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        found.extend(container(&line));
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// The container that a command line stands for: that of a sandbox process or of a pod's shim.
fn container(line: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(line);
    let arguments: Vec<&str> = text.split_terminator('\0').collect();
    let (first, rest) = arguments.split_first()?;
    match first.rsplit('/').next()? {
        "isopod" if rest.contains(&"sandbox") => rest.last().map(|&id| id.to_owned()),
        SHIM if rest.contains(&"serve") => {
            let at = rest.iter().position(|argument| *argument == "--id")?;
            rest.get(at + 1).map(|&id| id.to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_tell_their_containers() {
        let of = |arguments: &[&str]| container((arguments.join("\0") + "\0").as_bytes());
        assert_eq!(of(&["isopod", "sandbox", "--control-fd=3", "web"]).unwrap(), "web");
        let shim = [SHIM, "--namespace", "k8s.io", "--id", "pod", "--socket-fd", "3", "serve"];
        assert_eq!(of(&shim).unwrap(), "pod");
        for other in [&["isopod", "run", "web"][..], &["sh", "sandbox", "x"], &[SHIM, "start"], &[]]
        {
            assert_eq!(of(other), None, "{other:?}");
        }
    }
}
