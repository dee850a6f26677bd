//! Volumes: bind mounts of host directories and files, and what the host has mounted below them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};

use isopod_tests::{Container, Scope};

/// A directory of the host with mounts of its own below it. Unmounted when dropped.
struct Volume<'a> {
    scope: &'a Scope,
    path: PathBuf,
}

impl<'a> Volume<'a> {
    /// A tmpfs that passes on what is mounted below it, as systemd makes all mounts.
    fn new(scope: &'a Scope, name: &str) -> Self {
        let path = scope.dir().join(name);
        fs::create_dir(&path).unwrap();
        let volume = Self { scope, path };
        volume.shell(
            "mount -t tmpfs -o size=3m,mode=755 none . && cd \"$PWD\" && mount --make-shared .",
        );
        volume
    }

    /// Runs a script in it.
    #[track_caller]
    fn shell(&self, script: &str) {
        let script = format!("cd '{}' && {{ {script}; }}", self.path.display());
        self.scope.program(&["sh", "-c", &script]).output().ok();
    }

    /// Mounts a tmpfs on a new directory in it, with one file.
    #[track_caller]
    fn mount(&self, name: &str) {
        let mount = "mount -t tmpfs -o mode=755 none";
        self.shell(&format!("mkdir -p {name}; {mount} {name}; echo {name} > {name}/file"));
    }

    fn source(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        let script =
            format!("while umount --recursive --lazy '{}'; do :; done", self.path.display());
        self.scope.program(&["sh", "-c", &script]).output();
    }
}

fn shell(container: &Container<'_>, script: &str) -> String {
    container.exec(["sh", "-c", script]).ok().stdout
}

#[test]
fn a_volume_follows_the_host_as_its_propagation_says() {
    let scope = Scope::new();
    let asked: [(&str, &[&str], bool); 4] = [
        ("private", &["rbind", "rprivate"], false),
        ("unbindable", &["rbind", "runbindable"], false),
        ("slave", &["rbind", "rslave"], true),
        // As runc has it.
        ("none", &["rbind"], true),
    ];
    let volumes = asked.map(|(name, ..)| Volume::new(&scope, name));
    let mut container = scope.container().args(["sleep", "1000"]);
    for ((name, options, _), volume) in asked.iter().zip(&volumes) {
        volume.mount("old");
        container = container.mount(&format!("/{name}"), "bind", volume.source(), options);
    }
    let _created = container.start_new();
    for ((name, _, follows), volume) in asked.iter().zip(&volumes) {
        assert_eq!(shell(&container, &format!("cat /{name}/old/file")), "old\n", "{name}");
        volume.mount("new");
        let seen = shell(&container, &format!("cat /{name}/new/file || true"));
        assert_eq!(seen, if *follows { "new\n" } else { "" }, "{name}");
        if !follows {
            // Nothing of the container keeps it busy, and it keeps what it has.
            volume.shell("umount old");
            assert_eq!(shell(&container, &format!("cat /{name}/old/file")), "old\n", "{name}");
        }
    }
    container.delete_force().ok();
    drop(volumes);
    scope.assert_nothing_left();
}
