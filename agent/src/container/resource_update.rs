//! Changes the limits of a group in use: all of them, or none.

use super::cgroup::Cgroup;
use super::resources::{all_settings, check, write};
use crate::error::{Error, Result};
use crate::log::log_warn;
use crate::oci::{Resources, parse_json};

/// Changes limits. Fields that are absent, and the device rules, stay as they are.
///
/// If a limit cannot be set, the limits set before it are restored. With `checkBeforeUpdate`, a
/// memory limit below the current use is refused.
pub(crate) fn update(cgroup: &Cgroup, json: &[u8]) -> Result<()> {
    let resources: Resources = parse_json("the resources", json)?;
    check(&Resources { devices: Vec::new(), ..resources.clone() })?;
    let limit = resources.memory.limit.and_then(|limit| u64::try_from(limit).ok());
    if let (Some(true), Some(limit @ 1..)) = (resources.memory.check_before_update, limit) {
        let used = cgroup.read("memory.current")?.parse().unwrap_or(0);
        if used > limit {
            let why = format!("{used} bytes are in use, which is more than {limit}");
            return Err(Error::invalid("linux.resources.memory.limit", why));
        }
    }
    let mut undo = Vec::new();
    for (file, value) in all_settings(cgroup, &resources)? {
        let old = cgroup.read(&file);
        if let Err(e) = write(cgroup, &file, &value) {
            restore(cgroup, &undo);
            return Err(e);
        }
        if let Ok(old) = old {
            undo.push(undoing(file, &value, &old));
        }
    }
    Ok(())
}

/// Undoes writes, the last one first, because a value may depend on one before it.
fn restore(cgroup: &Cgroup, undo: &[Undo]) {
    for Undo { file, values } in undo.iter().rev() {
        for value in values {
            if let Err(left) = cgroup.write(file, value) {
                log_warn!("{left}");
            }
        }
    }
}

/// Values that undo a write to a file, in the order of writing.
struct Undo {
    file: String,
    values: Vec<String>,
}

/// The values that undo the write of `value`. `old` is the content of the file before the write.
///
/// `io.*` files have a line per device, and files of weights one more for the default, which comes
/// first. A write takes a single line.
fn undoing(file: String, value: &str, old: &str) -> Undo {
    let values = if !file.starts_with("io.") {
        // A write of no bytes, for an empty cpuset, would not reach the kernel.
        vec![if old.is_empty() { "\n".into() } else { old.into() }]
    } else if let Some((major, minor)) = device(value) {
        let line = old.lines().find(|line| device(line) == Some((major, minor)));
        let none = || format!("{major}:{minor} {}", no_setting(&file));
        vec![line.map_or_else(none, str::to_owned)]
    } else {
        // BFQ drops the weights of all devices when the default changes.
        old.lines().map(str::to_owned).collect()
    };
    Undo { file, values }
}

/// The number of the device at the beginning of a line.
fn device(line: &str) -> Option<(u32, u32)> {
    let (major, minor) = line.split_whitespace().next()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The words that remove the setting of a device, which the kernel then no longer lists.
fn no_setting(file: &str) -> &'static str {
    match file {
        "io.max" => "rbps=max wbps=max riops=max wiops=max",
        "io.latency" => "target=0",
        // io.weight and io.bfq.weight.
        _ => "default",
    }
}

#[cfg(test)]
mod tests {
    /// The values that undo a write.
    fn undoing(file: &str, value: &str, old: &str) -> Vec<String> {
        super::undoing(file.into(), value, old).values
    }

    #[test]
    fn a_file_of_one_value_gets_its_content_back() {
        assert_eq!(undoing("cpu.max", "5000 100000", "max 100000"), ["max 100000"]);
        assert_eq!(undoing("cpuset.cpus", "0", ""), ["\n"]);
        assert_eq!(undoing("io.prio.class", "idle", "no-change"), ["no-change"]);
    }

    #[test]
    fn a_file_of_devices_gets_one_line_back() {
        let old = "8:0 rbps=max wbps=7 riops=max wiops=max\n8:16 rbps=1 wbps=2 riops=3 wiops=4";
        let (first, second) = old.split_once('\n').unwrap();
        assert_eq!(undoing("io.max", "8:0 wbps=9", old), [first]);
        assert_eq!(undoing("io.max", "08:16 rbps=9", old), [second]);
        let none = "8:1 rbps=max wbps=max riops=max wiops=max";
        assert_eq!(undoing("io.max", "8:1 rbps=9", old), [none]);
        assert_eq!(undoing("io.max", "8:1 rbps=9", ""), [none]);
        assert_eq!(undoing("io.latency", "8:0 target=9", ""), ["8:0 target=0"]);
    }

    #[test]
    fn a_file_of_weights_gets_the_device_or_the_default_back() {
        let old = "default 100\n8:16 200";
        assert_eq!(undoing("io.weight", "8:16 300", old), ["8:16 200"]);
        assert_eq!(undoing("io.bfq.weight", "8:0 300", old), ["8:0 default"]);
        for value in ["300", "default 300"] {
            assert_eq!(undoing("io.bfq.weight", value, old), ["default 100", "8:16 200"]);
        }
    }
}
