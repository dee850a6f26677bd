//! The shim: one process for a pod, from the first task's creation to the last one's deletion.

use std::{
    env,
    fs::File,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use containerd_shim_protos::ttrpc::r#async::{Server, transport::Listener};
use rustix::fs::{Mode, OFlags};
use tokio::{net::UnixListener, sync::Notify};

use crate::{
    containerd::{
        TTRPC_ADDRESS, calls::Shim, events::Events, flags::Flags, pod_sandbox::PodSandbox,
        sandbox_service, service, tasks::Tasks,
    },
    descriptor::take_inherited,
    error::{Error, Explain, Result},
    event_loop::event_loop,
    limits, logger,
    signals::Signals,
};

/// Name of the fifo in the bundle that containerd reads the log from.
const LOG: &str = "log";

/// Is the shim, until containerd has it end.
pub(super) fn serve(flags: Flags) -> Result<()> {
    let socket = flags.socket_fd.ok_or_else(|| Error::new("--socket-fd is missing"))?;
    // Before anything is opened.
    let socket = take_inherited(socket)?;
    logger::init(open_log(), logger::Format::Text, flags.debug);
    // The shim is started for the first task of its pod.
    logger::set_sandbox(&flags.id);
    // The kernel names a process after the link that was executed.
    rustix::thread::set_name(c"isopod-shim").explain(|| "cannot set the name".into())?;
    limits::raise()?;
    let served = event_loop()?.block_on(run(&flags, socket));
    served.inspect_err(|error| log::error!("{error}"))
}

async fn run(flags: &Flags, socket: OwnedFd) -> Result<()> {
    let mut signals = Signals::new()?;
    let socket_file = flags.socket_path.as_deref().and_then(SocketFile::find);
    let address = env::var(TTRPC_ADDRESS).unwrap_or_default();
    let (events, forwarder) = Events::start(&address, &flags.namespace);
    let shim = Arc::new(Shim {
        namespace: flags.namespace.clone(),
        debug: flags.debug,
        tasks: Tasks::default(),
        sandbox: PodSandbox::default(),
        events: events.clone(),
        shutdown_asked: AtomicBool::default(),
        shutdown: Notify::new(),
    });
    let what = || "cannot serve the shim's socket".to_owned();
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true).explain(what)?;
    let listener = UnixListener::from_std(listener).explain(what)?;
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(service::services(&shim))
        .register_service(sandbox_service::services(&shim));
    server.start().await.map_err(|e| Error::new(format!("{}: {e}", what())))?;
    tokio::select! {
        () = shim.shutdown.notified() => {}
        number = signals.next_ending() => {
            log::warn!("the pod ends, because signal {number} was sent to its shim");
        }
    }
    // First, so that nobody finds a shim that is ending.
    drop(socket_file);
    shim.tasks.close().await;
    shim.sandbox.close().await;
    // The answer to the shutdown is on its way. Clients that wait hear of the end.
    if let Err(error) = server.shutdown().await {
        log::debug!("{error}");
    }
    drop((server, shim, events));
    forwarder.finish().await;
    Ok(())
}

/// The file of the shim's socket, removed when this is dropped, unless it is another's by then.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    fn find(path: &Path) -> Option<Self> {
        let inode = path.symlink_metadata().ok()?.ino();
        Some(Self { path: path.to_owned(), inode })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = self.path.symlink_metadata();
        if found.is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Opens the log in the bundle, which is the working directory. Open in both directions, it
/// outlives a restart of containerd. What nobody reads in time is lost: no log keeps a pod waiting.
fn open_log() -> Option<File> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(Path::new(LOG), flags, Mode::empty()).ok().map(File::from)
}
