//! The network benchmark: traffic between a container and the host's end of its link.
//!
//! The peers are a container without a microVM, and a guest of QEMU with virtio-net.

mod namespace;
mod qemu;
mod traffic;

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use self::namespace::{HOST, Namespace};
use self::traffic::Client;
use crate::clock::least;
use crate::figure::Figure;
use crate::guest::KERNEL_PARAMS;
use crate::runtime::Runtime;

pub(crate) use self::traffic::peer;

/// Bytes of a bulk transfer.
const BULK: u64 = 256 << 20;

/// Number of round trips.
const ROUND_TRIPS: u64 = 1000;

/// Names of the figures.
const NAMES: [&str; 3] = ["256 MiB to container", "256 MiB from container", "1000 round trips"];

/// Units of each of [`NAMES`].
type Traffic = [f64; 3];

/// Measures each kind of traffic `runs` times over one connection.
///
/// The three kinds of containers run one after the other, each in its own [`Namespace`].
pub(crate) fn measure(programs: &Path, bundle: &Path, runs: usize) -> Result<Vec<Figure>> {
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a subreaper")?;
    let program = bundle.join("rootfs/bin/isopod-bench");
    fs::copy("/proc/self/exe", &program).with_context(|| program.display().to_string())?;
    let runc = in_container(&Runtime::new("runc", "runc")?, bundle, runs)?;
    let qemu = in_qemu(programs, &program, runs)?;
    let isopod = Runtime::new("isopod", programs.join("isopod"))?.kernel_params(KERNEL_PARAMS);
    let ours = in_container(&isopod, bundle, runs)?;
    let beside = |peer, theirs: Traffic| {
        let all = NAMES.into_iter().zip(ours.into_iter().zip(theirs));
        all.map(move |(name, (ours, theirs))| Figure::beside(name, "units", ours, peer, theirs))
    };
    Ok(beside("runc", runc).chain(beside("qemu", qemu)).collect())
}

fn in_container(runtime: &Runtime, bundle: &Path, runs: usize) -> Result<Traffic> {
    let namespace = Namespace::new()?;
    let listener = TcpListener::bind((HOST, 0)).context(HOST)?;
    let address = listener.local_addr()?.to_string();
    let running = runtime.start_changed(bundle, |config| {
        config["process"]["args"] = json!(["/bin/isopod-bench", "peer", address]);
        for entry in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if entry["type"] == "network" {
                entry["path"] = json!(namespace.path());
            }
        }
    })?;
    let traffic = traffic(&listener, runtime.name, runs)?;
    running.wait()?;
    Ok(traffic)
}

fn in_qemu(programs: &Path, program: &Path, runs: usize) -> Result<Traffic> {
    let namespace = Namespace::new()?;
    let listener = TcpListener::bind((HOST, 0)).context(HOST)?;
    let address = listener.local_addr()?.to_string();
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let _machine = qemu::boot(&namespace, programs, program, &address, dir.path())?;
    traffic(&listener, "qemu", runs)
}

fn traffic(listener: &TcpListener, name: &str, runs: usize) -> Result<Traffic> {
    let (stream, _) = listener.accept().context("waiting for the container to connect")?;
    let mut client = Client::new(stream)?;
    let mut all = [const { Vec::new() }; 3];
    // In the first run the connection's windows grow. It does not count.
    for run in 0..=runs {
        let units = [client.give(BULK)?, client.take(BULK)?, client.echo(ROUND_TRIPS)?];
        let [to, from, trips] = units;
        eprintln!("{name}, run {run}: to {to:.1}, from {from:.1}, round trips {trips:.1}");
        if run > 0 {
            all.iter_mut().zip(units).for_each(|(all, units)| all.push(units));
        }
    }
    Ok(all.map(least))
}
