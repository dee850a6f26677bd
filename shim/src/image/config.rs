//! config.json for an image's configuration (image-spec conversion.md), on top of the default
//! specification.

use std::{
    collections::{BTreeMap, HashSet},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

use oci_spec::{
    image::{Config, ImageConfiguration},
    runtime::{Capability, Mount, Spec},
};

use crate::{
    bundle::{ANNOTATION_PREFIX, capabilities, default_spec},
    error::{Error, Explain, Result},
    image::{name::parts, tree::Tree, user},
    text::quoted,
};

/// Capabilities that engines give to images. Programs of images are made for them: they begin as
/// root, open a port, and change to another user.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// The config.json of a container that `image` asks for. Its working directory and its volumes are
/// made in `tree`.
pub(super) fn spec(image: &ImageConfiguration, tree: &mut Tree) -> Result<Spec> {
    let none = Config::default();
    let config = image.config().as_ref().unwrap_or(&none);
    let mut spec = default_spec();
    let user = user::resolve(config.user().as_deref().unwrap_or_default(), tree)?;
    let cwd = cwd(config, tree)?;
    if let Some(root) = spec.root_mut() {
        root.set_readonly(Some(false));
    }
    if let Some(process) = spec.process_mut() {
        process.set_user(user);
        process.set_cwd(cwd);
        let program = [config.entrypoint(), config.cmd()];
        let args: Vec<String> = program.into_iter().flatten().flatten().cloned().collect();
        // An image without a program keeps the default's shell, to look at the image.
        if !args.is_empty() {
            process.set_args(Some(args));
        }
        let defaults = process.env().clone().unwrap_or_default();
        process.set_env(Some(env(config.env().as_deref().unwrap_or_default(), defaults)));
        // Set-id programs and capabilities of files are part of an image.
        process.set_no_new_privileges(Some(false));
        process.set_capabilities(Some(capabilities(&CAPABILITIES)));
    }
    let mounts = spec.mounts_mut().get_or_insert_default();
    for volume in volumes(config)? {
        if mounts.iter().any(|mount| *mount.destination() == volume) {
            continue;
        }
        // The tmpfs takes its owner and its mode from the directory. If the directory were made at
        // the first start only, the tmpfs would have another mode from the second start on.
        let path = volume.as_os_str().as_bytes();
        directory(path, tree).explain(|| format!("the image's volume {}", quoted(path)))?;
        mounts.push(volume_mount(volume));
    }
    spec.set_annotations(Some(annotations(image, config).into_iter().collect()));
    Ok(spec)
}

/// The image's variables, and the defaults that it does not set.
fn env(image: &[String], defaults: Vec<String>) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let set: HashSet<String> = image.iter().map(|entry| name(entry)).collect();
    let missing = defaults.into_iter().filter(|entry| !set.contains(&name(entry)));
    image.iter().cloned().chain(missing).collect()
}

/// The working directory.
fn cwd(config: &Config, tree: &mut Tree) -> Result<PathBuf> {
    let path = config.working_dir().as_deref().unwrap_or_default();
    let what = || format!("the image's working directory {}", quoted(path.as_bytes()));
    directory(path.as_bytes(), tree).explain(what)?;
    absolute(path)
}

/// Makes a directory that the configuration names, if no layer has it. As in engines, the directory
/// belongs to root and has the mode 0755.
fn directory(path: &[u8], tree: &mut Tree) -> Result<()> {
    tree.directory(&parts(path)?, true).map(drop)
}

/// Directories for data that is no part of the image, sorted.
fn volumes(config: &Config) -> Result<Vec<PathBuf>> {
    let volumes = config.volumes().iter().flatten().map(|path| {
        let what = || format!("the image's volume {}", quoted(path.as_bytes()));
        match absolute(path).explain(what)? {
            root if *root == *"/" => Err(Error::new(format!("{} is the root itself", what()))),
            volume => Ok(volume),
        }
    });
    let mut volumes = volumes.collect::<Result<Vec<_>>>()?;
    volumes.sort();
    Ok(volumes)
}

/// Converts a path of the image to a path in the container.
fn absolute(path: &str) -> Result<PathBuf> {
    let parts = parts(path.as_bytes())?;
    let joined = String::from_utf8_lossy(&parts.join(&b'/')).into_owned();
    Ok(PathBuf::from(format!("/{joined}")))
}

/// A tmpfs that begins with the image's files. The container's data stays out of the root file
/// system, and ends with the container.
fn volume_mount(destination: PathBuf) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(destination);
    mount.set_typ(Some("tmpfs".to_owned()));
    mount.set_source(Some("tmpfs".into()));
    let options = ["nosuid", "nodev", "tmpcopyup"];
    mount.set_options(Some(options.map(str::to_owned).to_vec()));
    mount
}

/// Annotations for the image's properties, as the specification names them, and for its labels. A
/// label takes precedence over a property.
fn annotations(image: &ImageConfiguration, config: &Config) -> BTreeMap<String, String> {
    let mut ports: Vec<String> = config.exposed_ports().clone().unwrap_or_default();
    ports.sort();
    let implied = [
        ("os", Some(image.os().to_string())),
        ("architecture", Some(image.architecture().to_string())),
        ("variant", image.variant().clone()),
        ("os.version", image.os_version().clone()),
        ("os.features", image.os_features().as_ref().map(|features| features.join(","))),
        ("author", image.author().clone()),
        ("created", image.created().clone()),
        ("stopSignal", config.stop_signal().clone()),
        ("exposedPorts", Some(ports.join(","))),
    ];
    let implied = implied.into_iter().filter_map(|(name, value)| {
        let value = value.filter(|value| !value.is_empty())?;
        Some((format!("org.opencontainers.image.{name}"), value))
    });
    let mut annotations: BTreeMap<String, String> = implied.collect();
    for (name, value) in config.labels().iter().flatten() {
        let refusal = if name.is_empty() {
            "an annotation has to have a name"
        } else if name.starts_with(ANNOTATION_PREFIX) {
            "an image does not choose the settings of its microVM; to choose them, write the \
             annotation into config.json"
        } else {
            annotations.insert(name.clone(), value.clone());
            continue;
        };
        log::warn!("the image's label {} is left out: {refusal}", quoted(name.as_bytes()));
    }
    annotations
}
