//! The calls of one connection, carried out one at a time.

use std::{collections::VecDeque, io, os::fd::OwnedFd, sync::Arc};

use tokio::sync::watch;

use crate::{
    control::{
        connection::{Connection, Packet},
        message::{Call, Create, Message, Verb},
    },
    engine::{Container, Exec, ExecSpec, IoPlan, NewContainer, Request, Sandbox},
    error::{Error, ErrorKind, Result},
    logger,
    microvm::disks::OpenDisk,
    state::StateDir,
    stats::Stats,
};

/// Most calls of one connection that wait for the answer to an earlier call.
const MAX_AHEAD: usize = 16;

/// The client at the other end of a connection.
pub(super) struct Client {
    connection: Connection,
    ahead: VecDeque<Packet>,
    sandbox: Sandbox,
    closing: watch::Receiver<bool>,
}

/// The connection is to be closed: the client is gone, or has sent what cannot be read, or the
/// container has ended.
struct Close;

impl Client {
    pub(super) fn new(
        connection: Connection,
        sandbox: Sandbox,
        closing: watch::Receiver<bool>,
    ) -> Self {
        Self { connection, ahead: VecDeque::new(), sandbox, closing }
    }

    /// Carries out the calls until the client is gone or the sandbox is ending. The last call is
    /// carried out even if the client has gone.
    pub(super) async fn serve(mut self) {
        loop {
            let packet = tokio::select! {
                biased;
                packet = next(&mut self.ahead, &mut self.connection) => packet,
                () = closed(&mut self.closing) => return,
            };
            let packet = match packet {
                Ok(Some(packet)) => packet,
                Ok(None) => return,
                Err(error) => {
                    log::warn!("a call is not read: {error}");
                    // The client may have gone.
                    let why = format!("the sandbox process cannot read the call: {error}");
                    let _ = self.tell(&Message::Failed(Error::new(why))).await;
                    return;
                }
            };
            if self.call(packet).await.is_err() {
                return;
            }
        }
    }

    /// Waits for the answer to a call. If the client goes meanwhile, the answer is not waited for. A
    /// client that sends too many calls before it has its answers counts as gone.
    async fn unless_gone<T>(&mut self, answer: impl Future<Output = T>) -> Result<T, Close> {
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return Ok(answer),
                packet = self.connection.receive(), if self.ahead.len() < MAX_AHEAD => match packet {
                    Ok(Some(packet)) => self.ahead.push_back(packet),
                    Ok(None) | Err(_) => return Err(Close),
                },
            }
            if self.ahead.len() == MAX_AHEAD {
                return Err(Close);
            }
        }
    }

    /// Carries out one call.
    async fn call(&mut self, packet: Packet) -> Result<(), Close> {
        let Packet { line, descriptors } = packet;
        let call: Call = match serde_json::from_slice(&line) {
            Ok(call) => call,
            Err(e) => {
                let why = format!("the sandbox process cannot read the call: {e}");
                return self.tell(&Message::Failed(Error::new(why))).await;
            }
        };
        // It may be large, and the call may take as long as the container lives.
        drop(line);
        let container = call.container.clone();
        logger::about(container.as_str(), self.carry_out(call, descriptors)).await
    }

    async fn carry_out(&mut self, call: Call, descriptors: Vec<OwnedFd>) -> Result<(), Close> {
        if let Verb::Create(create) = call.verb {
            return self.create(*create, descriptors).await;
        }
        if matches!(call.verb, Verb::Hold) {
            return self.hold().await;
        }
        self.unless_gone(self.sandbox.clone().settled(&call.container)).await?;
        let Some(container) = self.sandbox.container(&call.container) else {
            // To the client this is the end of the container.
            return Err(Close);
        };
        let answer = match call.verb {
            Verb::Ask(request) => {
                self.unless_gone(container.ask(request)).await?.map(|()| Message::Done)
            }
            Verb::Wait => {
                let ended = self.unless_gone(container.ended()).await?;
                Ok(Message::Ended(Box::new(ended)))
            }
            Verb::Processes => {
                self.unless_gone(container.processes()).await?.map(Message::Processes)
            }
            Verb::Stats => self
                .unless_gone(container.stats())
                .await?
                .map(|stats| Message::Stats(Box::new(Stats::of(&stats)))),
            Verb::Figures => {
                let sandbox = self.sandbox.clone();
                let figures = self.unless_gone(sandbox.figures()).await?;
                Ok(Message::Figures(Box::new(figures)))
            }
            Verb::WaitOom { seen } => self
                .unless_gone(container.wait_oom(seen))
                .await?
                .map(|(count, ended)| Message::Oom { count, ended }),
            Verb::Exec { spec, io } => return self.exec(&container, *spec, io, descriptors).await,
            // Of a process that has ended meanwhile.
            Verb::PassOn(_) | Verb::Create(_) | Verb::Hold => return Ok(()),
        };
        match answer {
            Ok(message) => self.tell(&message).await,
            Err(error) if error.kind == ErrorKind::Ended => Err(Close),
            Err(error) => self.tell(&Message::Failed(error)).await,
        }
    }

    async fn tell(&self, message: &Message) -> Result<(), Close> {
        self.connection.send(message).await.map_err(|_| Close)
    }

    /// Keeps the microVM until the client is gone.
    async fn hold(&mut self) -> Result<(), Close> {
        let Some(_held) = self.sandbox.hold() else { return Err(Close) };
        self.tell(&Message::Done).await?;
        tokio::select! {
            _ = next(&mut self.ahead, &mut self.connection) => {}
            () = closed(&mut self.closing) => {}
        }
        Err(Close)
    }

    /// Runs a further process until it has ended or the client is gone.
    async fn exec(
        &mut self,
        container: &Container,
        spec: ExecSpec,
        io: IoPlan,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Close> {
        let started = match io.with(&mut descriptors.into_iter()) {
            Ok(io) => self.unless_gone(container.exec(spec, io)).await?,
            Err(error) => Err(error),
        };
        let mut exec: Exec = match started {
            Ok(exec) => exec,
            Err(error) if error.kind == ErrorKind::Ended => return Err(Close),
            Err(error) => return self.tell(&Message::Failed(error)).await,
        };
        self.tell(&Message::Created).await?;
        let exit = loop {
            tokio::select! {
                biased;
                exit = exec.wait() => break exit,
                // The drop of `exec` ends the process.
                packet = next(&mut self.ahead, &mut self.connection) => match verb(packet)? {
                    Verb::PassOn(Request::Kill { signal, all: false }) => exec.signal(signal),
                    Verb::PassOn(Request::Resize { size }) => exec.resize(size),
                    _ => return Err(Close),
                },
                // The rest of its output is cut off.
                () = closed(&mut self.closing) => break exec.last_exit(container).await,
            }
        };
        match exit {
            Ok(exit) => self.tell(&Message::Exited(exit)).await,
            Err(error) => self.tell(&Message::Failed(error)).await,
        }
    }

    /// Makes a further container, and serves its client until the container has ended. If the client
    /// goes before, the container is ended.
    async fn create(&mut self, create: Create, descriptors: Vec<OwnedFd>) -> Result<(), Close> {
        let id = create.record.id.clone();
        let reserved = match self.sandbox.reserve(&id) {
            Ok(reserved) => reserved,
            Err(error) => return self.tell(&Message::Failed(error)).await,
        };
        let creating = tokio::spawn(logger::inherit(async move {
            let mut descriptors = descriptors.into_iter();
            // In the order in which the client sends them.
            let io = create.io.with(&mut descriptors)?;
            let origin = create.origin.map(|origin| origin.with(&mut descriptors)).transpose()?;
            let trees = create.trees.with(&mut descriptors)?;
            let (disks, read_only) = (&create.guest.disks, &create.read_only_disks);
            let new = NewContainer {
                dir: Arc::new(StateDir::open_path(&create.dir)?),
                record: create.record,
                disks: OpenDisk::with(disks, read_only, &mut descriptors)?,
                guest: create.guest,
                io,
                loss_notice: create.loss_notice,
                origin,
                timeline: create.timeline,
            };
            reserved.create(new, trees).await
        }));
        tokio::pin!(creating);
        let created = match self.unless_gone(&mut creating).await {
            Ok(created) => created,
            Err(end) => {
                self.sandbox.abandon(&id).await;
                if let Ok(Ok(container)) = creating.await {
                    finish(&container).await;
                }
                return Err(end);
            }
        };
        let container = match created {
            Ok(Ok(container)) => container,
            Ok(Err(error)) => return self.tell(&Message::Failed(error)).await,
            Err(_) => return Err(Close),
        };
        let ended = match self.attend(&container).await {
            Ok(ended) => ended,
            Err(end) => {
                finish(&container).await;
                return Err(end);
            }
        };
        self.tell(&ended).await
    }

    /// Passes signals on to a container until it has ended.
    async fn attend(&mut self, container: &Container) -> Result<Message, Close> {
        self.tell(&Message::Created).await?;
        loop {
            tokio::select! {
                biased;
                ended = container.ended() => return Ok(Message::Ended(Box::new(ended))),
                packet = next(&mut self.ahead, &mut self.connection) => match verb(packet)? {
                    Verb::PassOn(
                        request @ (Request::Kill { all: false, .. } | Request::Resize { .. }),
                    ) => container.pass_on(request),
                    _ => return Err(Close),
                },
            }
        }
    }
}

/// Ends a container whose client is gone.
async fn finish(container: &Container) {
    // It may be ending already.
    let _ = container.ask(Request::Destroy).await;
    container.ended().await;
}

/// Waits until the sandbox has ended.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // The sender is there as long as the connection.
    let _ = closing.wait_for(|closing| *closing).await;
}

/// The next call of a connection. `None` if the client is gone. A cancelled wait loses nothing.
async fn next(
    ahead: &mut VecDeque<Packet>,
    connection: &mut Connection,
) -> io::Result<Option<Packet>> {
    match ahead.pop_front() {
        Some(packet) => Ok(Some(packet)),
        None => connection.receive().await,
    }
}

/// The verb of a call about the process that a client attends.
fn verb(packet: io::Result<Option<Packet>>) -> Result<Verb, Close> {
    let packet = packet.ok().flatten().ok_or(Close)?;
    let call: Call = serde_json::from_slice(&packet.line).map_err(|_| Close)?;
    Ok(call.verb)
}
