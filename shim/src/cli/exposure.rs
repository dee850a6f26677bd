//! Settings of the host that affect what a guest may learn of other guests. They are shown for the
//! operator to judge.

use std::{fs, path::Path};

/// Most names in a line.
const MAX_NAMED: usize = 8;

/// State of simultaneous multithreading, from the directory `cpu/smt` of sysfs.
pub(super) fn smt(dir: &Path) -> String {
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let control = read("control");
    let control = control.trim_end();
    match read("active").trim_end() {
        "1" => format!(
            "on: guests of two microVMs may share a core, which some processors leak over (`nosmt` on \
             the kernel's command line turns it off; control is {control})"
        ),
        "0" => format!("off ({control})"),
        _ => "the kernel does not say".to_owned(),
    }
}

/// State of kernel samepage merging, from the directory `mm/ksm` of sysfs.
pub(super) fn ksm(dir: &Path) -> String {
    match fs::read_to_string(dir.join("run")).unwrap_or_default().trim_end() {
        "1" => "on: it merges pages of processes that ask for it; a microVM does not ask, unless \
                the caller of isopod has asked for all of its processes; the timing of merged \
                pages tells a guest what others have in memory (`echo 2 > \
                /sys/kernel/mm/ksm/run` ends it)"
            .to_owned(),
        "0" | "2" => "off".to_owned(),
        _ => "the kernel has none".to_owned(),
    }
}

/// Weaknesses of the processor without a complete mitigation by the kernel, from the directory
/// `cpu/vulnerabilities` of sysfs.
pub(super) fn mitigations(dir: &Path) -> String {
    let mut files: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().collect();
    files.sort_by_key(fs::DirEntry::file_name);
    let (mut open, mut in_part) = (Vec::new(), Vec::new());
    for file in &files {
        let text = fs::read_to_string(file.path()).unwrap_or_default().to_lowercase();
        let name = file.file_name().to_string_lossy().into_owned();
        if text.starts_with("vulnerable") || text.starts_with("unknown") {
            open.push(name);
        } else if text.contains("vulnerable") {
            in_part.push(name);
        }
    }
    let known = files.len();
    match (open.is_empty(), in_part.is_empty()) {
        _ if known == 0 => "the kernel does not say".to_owned(),
        (true, true) => format!("none of {known} known weaknesses is open"),
        (true, false) => format!("open in part (with SMT or nested guests): {}", named(&in_part)),
        (false, true) => format!("OPEN: {}", named(&open)),
        (false, false) => format!("OPEN: {}; in part: {}", named(&open), named(&in_part)),
    }
}

fn named(names: &[String]) -> String {
    let more = names.len().saturating_sub(MAX_NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", names.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), format!("{text}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn what_is_open_is_named() {
        let of = |files: &[(&str, &str)]| mitigations(dir(files).path());
        let sound = ("l1tf", "Mitigation: PTE Inversion");
        let part = ("mds", "Mitigation: Clear CPU buffers; SMT vulnerable");
        let bare = ("srbds", "Vulnerable: No microcode");
        assert_eq!(of(&[]), "the kernel does not say");
        assert_eq!(of(&[sound, ("srbds", "Not affected")]), "none of 2 known weaknesses is open");
        assert_eq!(of(&[sound, part]), "open in part (with SMT or nested guests): mds");
        assert_eq!(of(&[sound, part, bare]), "OPEN: srbds; in part: mds");
    }

    #[test]
    fn the_kernels_words_are_understood() {
        assert!(smt(dir(&[("active", "1"), ("control", "on")]).path()).starts_with("on: "));
        let off = dir(&[("active", "0"), ("control", "notsupported")]);
        assert_eq!(smt(off.path()), "off (notsupported)");
        assert_eq!(ksm(dir(&[("run", "0")]).path()), "off");
        assert!(ksm(dir(&[("run", "1")]).path()).starts_with("on: "));
        assert_eq!(ksm(dir(&[]).path()), "the kernel has none");
    }
}
