//! Events for containerd: in order, each until containerd has taken it, also over a restart of
//! containerd. One that was taken when the connection broke may come twice.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    protobuf::Message,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    topics,
    ttrpc::{self, r#async::transport::Socket, context},
};
use tokio::{
    net::UnixStream,
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::containerd::messages::{EVENTS, any, timestamp};

/// Longest time for containerd to take an event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between attempts to reach a containerd that is away, from the first to the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// Longest time that the end of the shim waits for events to be taken.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Most events that wait. Events of kills at a memory limit are left out then: a guest makes them.
const MAX_WAITING: usize = 1024;

/// The way to containerd. Clones are the same way.
#[derive(Clone)]
pub(super) struct Events(Option<Queue>);

#[derive(Clone)]
struct Queue {
    namespace: Arc<str>,
    sender: mpsc::UnboundedSender<ForwardRequest>,
    /// Number of events that wait.
    waiting: Arc<AtomicUsize>,
}

/// The task that sends events.
pub(super) struct Forwarder(Option<tokio::task::JoinHandle<()>>);

impl Events {
    /// Starts the task that sends events to the ttrpc socket at `address`, such as
    /// `/run/containerd/containerd.sock.ttrpc`. Without an address, as under CRI-O, nobody wants
    /// events.
    pub(super) fn start(address: &str, namespace: &str) -> (Self, Forwarder) {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        if path.is_empty() {
            return (Self(None), Forwarder(None));
        }
        let (sender, events) = mpsc::unbounded_channel();
        let waiting = Arc::default();
        let task = forward(PathBuf::from(path), events, Arc::clone(&waiting));
        let queue = Queue { namespace: namespace.into(), sender, waiting };
        (Self(Some(queue)), Forwarder(Some(tokio::spawn(task))))
    }

    /// A way to nobody, for what containerd does not know of.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Tells whether nobody gets the events.
    pub(super) fn are_unheard(&self) -> bool {
        self.0.is_none()
    }

    /// Sends an event after those before it.
    pub(super) fn send<E: Message>(&self, topic: &'static str, event: &E) {
        let Some(queue) = &self.0 else { return };
        let full = queue.waiting.load(Ordering::Relaxed) >= MAX_WAITING;
        if full && topic == topics::TASK_OOM_EVENT_TOPIC {
            return;
        }
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: queue.namespace.to_string(),
            topic: topic.to_owned(),
            event: Some(any(EVENTS, event)).into(),
            ..Envelope::default()
        };
        queue.waiting.fetch_add(1, Ordering::Relaxed);
        let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
        // Fails if the shim is ending.
        let _ = queue.sender.send(request);
    }
}

impl Forwarder {
    /// Waits until all events are sent. All [`Events`] have to be dropped.
    pub(super) async fn finish(self) {
        if let Some(task) = self.0
            && timeout(FLUSH_TIMEOUT, task).await.is_err()
        {
            log::warn!("containerd does not take the last events");
        }
    }
}

async fn forward(
    path: PathBuf,
    mut events: mpsc::UnboundedReceiver<ForwardRequest>,
    waiting: Arc<AtomicUsize>,
) {
    let mut client = None;
    while let Some(request) = events.recv().await {
        let mut pause = PAUSES[0];
        loop {
            match attempt(&mut client, &path, &request).await {
                Ok(()) => break,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    log::warn!("containerd does not take an event: {}", status.message);
                    break;
                }
                Err(error) => {
                    log::debug!("an event waits: {error}");
                    client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSES[1]);
                }
            }
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn attempt(
    client: &mut Option<EventsClient>,
    path: &Path,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(connected) => connected,
        None => {
            let stream = UnixStream::connect(path).await;
            let stream = stream.map_err(|e| ttrpc::Error::Others(e.to_string()))?;
            client.insert(EventsClient::new(Client::new(Socket::new(stream))))
        }
    };
    let context = context::with_timeout(i64::try_from(FORWARD_TIMEOUT.as_nanos()).unwrap_or(0));
    // The client's own limit does not cover a connection that takes nothing.
    match timeout(FORWARD_TIMEOUT * 2, connected.forward(context, request)).await {
        Ok(sent) => sent.map(drop),
        Err(_) => Err(ttrpc::Error::Others("containerd does not answer".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use containerd_shim_protos::{
        api::Empty,
        events::task::{TaskOOM, TaskStart},
        shim_async::{self, create_events},
        ttrpc::{
            Code,
            r#async::{Server, TtrpcContext, transport::Listener},
        },
    };
    use tokio::net::UnixListener;

    use super::*;

    /// A containerd that refuses its first event.
    #[derive(Default)]
    struct Containerd(Mutex<Vec<(String, String)>>);

    #[async_trait]
    impl shim_async::Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, r: ForwardRequest) -> ttrpc::Result<Empty> {
            let mut seen = self.0.lock().unwrap();
            let envelope = r.envelope.unwrap();
            seen.push((envelope.topic, envelope.event.type_url.clone()));
            match seen.len() {
                1 => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, "no"))),
                _ => Ok(Empty::default()),
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn events_wait_for_containerd_and_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (events, forwarder) = Events::start(path.to_str().unwrap(), "k8s.io");
        for _ in 0..2 {
            events.send(topics::TASK_START_EVENT_TOPIC, &TaskStart::default());
        }
        // Nobody listens yet.
        tokio::task::yield_now().await;
        let containerd = Arc::new(Containerd::default());
        let listener = Listener::from(UnixListener::bind(&path).unwrap());
        let services = create_events(Arc::clone(&containerd) as Arc<_>);
        let mut server = Server::new().add_listener(listener).register_service(services);
        server.start().await.unwrap();
        events.send(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM::default());
        drop(events);
        forwarder.finish().await;
        let start = ("/tasks/start".to_owned(), "containerd.events.TaskStart".to_owned());
        let oom = ("/tasks/oom".to_owned(), "containerd.events.TaskOOM".to_owned());
        assert_eq!(*containerd.0.lock().unwrap(), [start.clone(), start, oom]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_guest_cannot_fill_the_queue() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nobody");
        let (events, _forwarder) = Events::start(path.to_str().unwrap(), "k8s.io");
        for _ in 0..2 * MAX_WAITING {
            events.send(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM::default());
        }
        let waiting = || events.0.as_ref().unwrap().waiting.load(Ordering::Relaxed);
        assert_eq!(waiting(), MAX_WAITING);
        events.send(topics::TASK_START_EVENT_TOPIC, &TaskStart::default());
        assert_eq!(waiting(), MAX_WAITING + 1);
    }
}
