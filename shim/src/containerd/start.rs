//! The action `start`: starts the shim of a task or a sandbox, or finds the shim of the task's pod.

use std::{
    env, fs,
    io::{IsTerminal, Read},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
};
use sha2::{Digest, Sha256};

use crate::{
    container_id::ContainerId,
    containerd::{
        PROGRAM, TTRPC_ADDRESS, delete,
        flags::Flags,
        messages::{encoded, print},
    },
    descriptor::inherit_only,
    error::{Error, Explain, Result},
    state::write_whole,
};

/// Directory of the sockets, unless containerd names another. It is short: the address of a socket
/// has 108 bytes at most.
const SOCKETS: &str = "/run/containerd/s";

/// Version of the answer that a containerd with bootstrap parameters reads.
const ANSWER_VERSION: i32 = 3;

/// Largest input.
const MAX_INPUT: u64 = 16 << 20;

/// File in the bundle with the shim's address, for a containerd that has been restarted.
const ADDRESS_FILE: &str = "address";

/// Annotations with the id of the pod that a task belongs to: those of containerd, CRI-O and of
/// runc's shim.
const POD_ANNOTATIONS: [&str; 3] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// Variable with which containerd asks for a core scheduling group of the shim's own.
const SCHED_CORE: &str = "SCHED_CORE";

/// Scope of a core scheduling group: all threads of a process (linux/prctl.h).
const PR_SCHED_CORE_SCOPE_THREAD_GROUP: libc::c_int = 1;

/// Starts the shim, and prints its address. The working directory is the bundle.
pub(super) fn start(flags: &Flags) -> Result<()> {
    let id = ContainerId::parse(&flags.id)?;
    let parameters = parameters(flags)?;
    let pod = pod_of(&id)?;
    let socket = socket_path(flags, &pod, parameters.as_ref());
    let address = format!("unix://{}", socket.display());
    if UnixStream::connect(&socket).is_err() {
        if pod != id.as_str() {
            return Err(Error::new(format!(
                "container {id} belongs to pod {pod}, whose shim does not run"
            )));
        }
        if env::var_os(SCHED_CORE).is_some_and(|value| !value.is_empty()) {
            take_core_group()?;
        }
        if env::var_os(TTRPC_ADDRESS).is_none_or(|value| value.is_empty()) {
            delete::sweep(&flags.namespace);
        }
        let mut shim = launch(flags, &socket)?;
        return answer(address, parameters.is_some()).inspect_err(|_| {
            // containerd does not know of it.
            let _ = shim.kill();
            let _ = fs::remove_file(&socket);
        });
    }
    answer(address, parameters.is_some())
}

/// Tells the shim's address, in the bundle and to containerd.
fn answer(address: String, with_parameters: bool) -> Result<()> {
    write_whole(Path::new(ADDRESS_FILE), address.as_bytes())
        .explain(|| format!("cannot write {ADDRESS_FILE} in the bundle"))?;
    let answer = match with_parameters {
        // containerd 2.3.0 to 2.3.3 trims what it reads, so a text is its last field.
        true => {
            let result = BootstrapResult {
                version: ANSWER_VERSION,
                address,
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            };
            encoded(&result)?
        }
        false => address.into_bytes(),
    };
    print(&answer)
}

/// The bootstrap parameters, if standard input has some. Earlier versions of containerd pass
/// options there, and the two may decode as each other: so id and namespace have to agree.
fn parameters(flags: &Flags) -> Result<Option<BootstrapParams>> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(None);
    }
    let mut input = Vec::new();
    stdin.take(MAX_INPUT).read_to_end(&mut input).explain(|| "cannot read the options".into())?;
    Ok(decode(&input, flags))
}

fn decode(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let parameters = BootstrapParams::parse_from_bytes(input).ok();
    parameters.filter(|given| {
        !given.instance_id.is_empty()
            && given.instance_id == flags.id
            && given.namespace == flags.namespace
    })
}

/// Id of the pod that the bundle belongs to: the task itself, unless config.json names another. The
/// bundle of a sandbox has no config.json yet.
fn pod_of(id: &ContainerId) -> Result<String> {
    let what = || "cannot read config.json in the working directory, the bundle".to_owned();
    let text = match fs::read("config.json") {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(id.as_str().to_owned());
        }
        read => read.explain(what)?,
    };
    let spec: serde_json::Value = serde_json::from_slice(&text).explain(what)?;
    let named = POD_ANNOTATIONS.iter().find_map(|key| spec["annotations"][*key].as_str());
    match named.filter(|pod| !pod.is_empty()) {
        Some(pod) => ContainerId::parse(pod).map(|pod| pod.as_str().to_owned()),
        None => Ok(id.as_str().to_owned()),
    }
}

/// Path of the socket: one for each pod of a namespace of a containerd.
fn socket_path(flags: &Flags, pod: &str, parameters: Option<&BootstrapParams>) -> PathBuf {
    let directory = parameters
        .and_then(|parameters| parameters.socket_dir.as_deref())
        .filter(|directory| !directory.is_empty())
        .unwrap_or(SOCKETS);
    let mut hash = Sha256::new();
    for part in [&flags.address, flags.namespace.as_str(), pod] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(directory).join(name)
}

/// Puts this process into a new core scheduling group, which its children inherit. Threads of other
/// groups then never share a core with the pod's vCPUs (core-scheduling.rst).
fn take_core_group() -> Result<()> {
    let scope = PR_SCHED_CORE_SCOPE_THREAD_GROUP;
    // SAFETY: takes numbers only.
    let made = unsafe { libc::prctl(libc::PR_SCHED_CORE, libc::PR_SCHED_CORE_CREATE, 0, scope, 0) };
    if made == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
        .explain(|| format!("cannot make a core scheduling group, which {SCHED_CORE} asks for"))
}

/// Starts the shim with its socket open, so that whoever has the address can connect.
fn launch(flags: &Flags, socket: &Path) -> Result<Child> {
    let what = || format!("cannot listen at {}", socket.display());
    if let Some(directory) = socket.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(directory).explain(what)?;
    }
    // A shim that was killed has left it.
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).explain(what)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).explain(what)?;
    let listening = listener.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(PROGRAM);
    command.args(["--namespace", &flags.namespace, "--address", &flags.address]);
    command.args(["--id", &flags.id]);
    if flags.debug {
        command.arg("--debug");
    }
    command.arg("--socket-fd").arg(listening.to_string());
    command.arg("--socket-path").arg(socket);
    command.arg("serve");
    // containerd reads standard output and standard error of this action to their end.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: setsid, close_range and fcntl are async-signal-safe. The closure allocates nothing and
    // takes no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            inherit_only(&[listening])
        });
    }
    command.spawn().inspect_err(|_| drop(fs::remove_file(socket))).explain(|| {
        let program = env::current_exe().unwrap_or_default();
        format!("cannot start {}", program.display())
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    fn flags(id: &str) -> Flags {
        let args = ["shim", "-namespace", "k8s.io", "-address", "/run/c.sock", "-id", id, "start"];
        Flags::parse(args.into_iter().map(OsString::from)).unwrap()
    }

    #[test]
    fn parameters_are_those_of_this_task() {
        let given = BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            socket_dir: Some("/run/s".into()),
            ..BootstrapParams::default()
        };
        let input = given.write_to_bytes().unwrap();
        let found = decode(&input, &flags("web"));
        assert_eq!(found.as_ref(), Some(&given));
        assert_eq!(decode(&input, &flags("other")), None);
        assert_eq!(decode(b"", &flags("web")), None);
        // Options of an earlier containerd decode as parameters too.
        let options = Any { type_url: "web".into(), value: b"k8s.io".to_vec(), ..Any::default() };
        let decoded = decode(&options.write_to_bytes().unwrap(), &flags("web"));
        assert!(decoded.is_none_or(|decoded| decoded.containerd_version.is_empty()));
        let path = socket_path(&flags("web"), "web", found.as_ref());
        assert!(path.starts_with("/run/s"));
    }

    #[test]
    fn a_pod_has_one_short_address() {
        let of = |id: &str, pod: &str| socket_path(&flags(id), pod, None);
        assert_eq!(of("a", "pod"), of("b", "pod"));
        assert_ne!(of("a", "pod"), of("a", "other"));
        // sockaddr_un(7), with `unix://` and a zero.
        assert!(of("a", "pod").to_string_lossy().len() + 8 <= 106);
    }
}
