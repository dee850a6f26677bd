//! Port forwarding: connections to loopback in the network namespace that stands for a pod's, passed
//! on to loopback in the guest.

use std::{io, sync::Arc, time::Duration};

use isopod_protocol::STREAM_PORT;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    error::{Explain, Result},
    microvm::{agent::Agent, vsock},
    network::{LoopbackCatch, loopback_target},
    random::random_u64,
    state::StateDir,
};

/// Most connections at a time. Others wait for their turn.
const MAX_FORWARDS: usize = 256;

/// Longest time for the guest to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Pause after a failed accept: descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Passes connections on, from the network namespace of the calling thread, until the future is
/// dropped. `agent` is about a container that has the pod's network.
pub(crate) async fn serve(agent: Agent, dir: Arc<StateDir>) -> Result<()> {
    let what = || "cannot serve the pod's loopback".to_owned();
    // It lasts as long as the future.
    let (_catch, listener) = LoopbackCatch::new()?;
    let listener = TcpListener::from_std(listener).explain(what)?;
    let turns = Arc::new(Semaphore::new(MAX_FORWARDS));
    loop {
        // Never closed.
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::debug!("{}: {error}", what());
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (agent, dir) = (agent.clone(), Arc::clone(&dir));
        tokio::spawn(async move {
            if let Err(error) = forward(stream, &agent, &dir).await {
                log::debug!("{error}");
            }
            drop(turn);
        });
    }
}

async fn forward(mut stream: TcpStream, agent: &Agent, dir: &StateDir) -> Result<()> {
    let connected = async {
        let local = stream.local_addr().explain(|| "cannot read an address".into())?;
        let (port, ipv6) = loopback_target(local);
        // Token 0 means "not connected".
        let token = random_u64()?.max(1);
        let mut guest = vsock::connect(dir, STREAM_PORT).await?;
        let written = guest.write_all(&token.to_le_bytes()).await;
        written.explain(|| "cannot open a stream to the microVM".into())?;
        agent.forward_port(port, ipv6, token).await?;
        Ok(guest)
    };
    let connected = timeout(CONNECT_TIMEOUT, connected).await.unwrap_or_else(|_| {
        let late = io::Error::from(io::ErrorKind::TimedOut);
        Err(late).explain(|| "cannot forward a connection".into())
    });
    let mut guest = match connected {
        Ok(guest) => guest,
        Err(error) => {
            // Nobody listens: a reset comes closest to a refusal.
            let _ = stream.set_zero_linger();
            return Err(error);
        }
    };
    // Either end may break the connection. The other end sees it closed then.
    let _ = copy_bidirectional(&mut stream, &mut guest).await;
    Ok(())
}
