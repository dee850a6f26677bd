//! A disk for containerd's layers. The kernel maps the owners of a tmpfs from Linux 6.3 on only, and
//! those of ext4 since 5.12. containerd 2 relies on it for pods with a user namespace.

use isopod_tests::engine::Engine;

/// Moves containerd's root directory to an ext4 file system, which lives as long as the engine.
pub(crate) fn with_disk(engine: Engine) -> Engine {
    engine.kill_containerd_daemon();
    let (image, root) = (engine.path("disk"), engine.path("containerd"));
    // The engine's tree may lack these programs.
    let make = format!("truncate -s 512M {image}; mkfs.ext4 -q {image}; modprobe loop || true");
    engine.on_network(&["sh", "-ec", &make]).output().ok();
    let fill = format!(
        "mv {root} {root}.old; mkdir {root}; mount -o loop {image} {root}; \
         cp -a {root}.old/. {root}; rm -r {root}.old"
    );
    engine.inside(&["sh", "-ec", &fill]).output().ok();
    engine.start_containerd_daemon();
    engine
}
