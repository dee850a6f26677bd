//! Service of the queues. Workers take requests, and answer them at once or later.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use fuse_backend_rs::abi::fuse_abi::{InHeader, InterruptIn, Opcode, OutHeader};
use virtio_queue::DescriptorChain;
use vm_memory::{
    ByteValued as _, Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _,
};
use vmm_sys_util::eventfd::EventFd;

use super::super::chain::Chain;
use super::super::device::Activation;
use super::super::queue::ActiveQueue;
use super::super::worker::{Stop, wait_for_work};
use super::counts::RequestCounts;
use super::dispatch::{self, Answer};
use super::files::Files;
use super::init::{MAX_PAGES, PAGE_SIZE};
use super::lock::Wait;
use super::request::{take, take_header};
use super::share::{Opened, Share};
use super::waiter::Waiters;
use crate::jail::keep_capabilities;
use crate::memory::GuestMemoryMap;
use crate::sync::lock;

/// Guest memory for each node in bytes. A guest's kernel takes more for each file that it knows of.
const MEMORY_OF_NODE: u64 = 1024;

/// Most bytes of a request or its answer: the data, and a page for the rest. Descriptors may name
/// the same memory again and again, and some requests are copied whole.
const MAX_MESSAGE_LEN: usize = (MAX_PAGES as usize + 1) * PAGE_SIZE as usize;

const FORGETS: [u32; 2] = [Opcode::Forget as u32, Opcode::BatchForget as u32];

/// Shared data of the workers.
pub(super) struct Service {
    share: Arc<OnceLock<Opened>>,
    counts: Arc<RequestCounts>,
    memory: GuestMemoryMap,
    queues: Vec<Mutex<ActiveQueue>>,
    begin: OnceLock<Result<(), io::ErrorKind>>,
    lead: Mutex<()>,
    kicks: Vec<EventFd>,
    waiters: Waiters,
}

/// A request, and the number of its queue.
struct QueuedRequest<'m> {
    queue: usize,
    queue_size: u16,
    chain: DescriptorChain<&'m GuestMemoryMap>,
}

impl Service {
    /// Creates a service for queues that were just activated.
    pub(super) fn new(share: &Share, active: Activation) -> io::Result<Self> {
        let kicks = active
            .queues
            .iter()
            .map(|queue| queue.kick().try_clone())
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            share: share.opened(),
            counts: Arc::clone(share.requests()),
            memory: active.memory,
            queues: active.queues.into_iter().map(Mutex::new).collect(),
            begin: OnceLock::new(),
            lead: Mutex::new(()),
            kicks,
            waiters: Waiters::new()?,
        })
    }

    /// Serves requests until the stop.
    pub(super) fn serve(self: &Arc<Self>, stop: &Stop) {
        let opened = match self.opened() {
            Ok(opened) => opened,
            Err(e) => return stop.fail(format!("cannot serve the shared directory: {e}")),
        };
        while let Some(request) = self.next_request(stop) {
            let (queue, head) = (request.queue, request.chain.head_index());
            if let Some(written) = self.answer(&opened.files, request) {
                self.push(queue, head, written);
            }
        }
    }

    /// Closes idle descriptors in mounts that the host may remove, until the stop.
    pub(super) fn close_idle(&self, stop: &Stop) {
        if let Some(opened) = self.share.get() {
            opened.files.idle.close_while_running(stop);
        }
    }

    /// Ends all waits. Nothing is pushed to a queue afterwards.
    pub(super) fn end_waits(&self) {
        self.waiters.end();
    }

    fn push(&self, queue: usize, head: u16, written: u32) {
        let mut queue = lock(&self.queues[queue]);
        queue.push(&self.memory, head, written);
        queue.signal(&self.memory);
    }

    /// Prepares the calling worker. The first worker prepares the share as well.
    fn opened(&self) -> io::Result<&Opened> {
        let opened = self.share.get().ok_or(io::ErrorKind::NotFound)?;
        if let Some(jail) = &opened.jail {
            jail.keep_thread()?;
        }
        // A failure is no error: without capabilities for other users, fewer files can be made.
        let _ = keep_capabilities();
        // The guest has applied its own umask to the modes.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        // A driver begins with no open file and no known inode except the root. The path of the
        // root holds in the jail only, so the worker opens it.
        let memory: u64 = self.memory.iter().map(|region| region.len()).sum();
        let nodes = usize::try_from(memory / MEMORY_OF_NODE).unwrap_or(usize::MAX);
        let begin = || opened.files.begin(nodes).map_err(|e| e.kind());
        self.begin.get_or_init(begin).map_err(io::Error::from)?;
        Ok(opened)
    }

    /// Waits for the lead, then for a request. `None` on the stop.
    fn next_request(&self, stop: &Stop) -> Option<QueuedRequest<'_>> {
        let _lead = lock(&self.lead);
        while !stop.is_given() {
            for (index, queue) in self.queues.iter().enumerate() {
                let mut queue = lock(queue);
                if let Some(chain) = queue.pop_raw(&self.memory) {
                    return Some(QueuedRequest { queue: index, queue_size: queue.size(), chain });
                }
            }
            let mut more = false;
            for queue in &self.queues {
                more |= lock(queue).enable_kicks(&self.memory);
            }
            if !more {
                wait_for_work(stop, &self.kicks.iter().collect::<Vec<_>>());
            }
        }
        None
    }

    /// Serves one request. Returns the number of bytes of its answer, or `None` if the answer comes
    /// later. A request that cannot be decoded is given back without an answer.
    fn answer(self: &Arc<Self>, files: &Files, request: QueuedRequest<'_>) -> Option<u32> {
        let QueuedRequest { queue, queue_size, chain } = request;
        let later = chain.clone();
        let Ok(Chain { mut readable, mut writable, .. }) =
            Chain::new(&self.memory, chain, queue_size)
        else {
            return Some(0);
        };
        // Not checked earlier: the guest may change its descriptors until they are mapped.
        if readable.len() > MAX_MESSAGE_LEN || writable.len() > MAX_MESSAGE_LEN {
            return Some(0);
        }
        let Some((header, fits)) = take_header(&mut readable) else { return Some(0) };
        self.counts.count(header.opcode);
        if FORGETS.contains(&header.opcode) {
            // An invalid forget has no answer either.
            let _ = fits.and_then(|()| dispatch::forget(files, &header, readable));
            return Some(0);
        }
        if header.opcode == Opcode::Interrupt as u32 {
            if let Ok(InterruptIn { unique }) = take(&mut readable) {
                self.waiters.interrupt(unique);
            }
            return Some(0);
        }
        let Some(mut head) = writable.split_to(size_of::<OutHeader>()) else { return Some(0) };
        let answer = fits.and_then(|()| dispatch::serve(files, &header, readable, &writable));
        let answer = match answer {
            Ok(Answer::Later(wait)) => match self.wait(&header, wait, queue, later) {
                Ok(()) => return None,
                Err(e) => Err(e),
            },
            answer => answer,
        };
        let written = match &answer {
            // Bytes that do not fit are no answer.
            Ok(Answer::Bytes(bytes)) => writable.put(bytes).map(|()| bytes.len()),
            Ok(Answer::Data(len)) => Some(*len),
            Ok(Answer::Later(_)) | Err(_) => Some(0),
        };
        let Some(body) = written else { return Some(0) };
        let out = out_header(&header, answer.err().as_ref(), body);
        // The room was split off with the header's length, so the header is written.
        head.put(out.as_slice()).map(|()| out.len).or(Some(0))
    }

    /// Passes a request to a thread that waits for a lock, and answers it afterwards.
    fn wait(
        self: &Arc<Self>,
        header: &InHeader,
        wait: Wait,
        queue: usize,
        chain: DescriptorChain<&GuestMemoryMap>,
    ) -> io::Result<()> {
        let later = Later {
            service: Arc::clone(self),
            header: *header,
            queue,
            head: chain.head_index(),
            room: chain.writable().map(|part| (part.addr(), part.len() as usize)).collect(),
        };
        let service = Arc::clone(self);
        let settle = move |wait: &mut Wait| match service.share.get() {
            Some(opened) => wait.settle(&opened.files),
            None => Ok(false),
        };
        self.waiters.start(header.unique, wait, settle, move |result| later.finish(result))
    }
}

/// A request with a later answer. Its room is stored as guest addresses, which are mapped again
/// then.
struct Later {
    service: Arc<Service>,
    header: InHeader,
    queue: usize,
    head: u16,
    room: Vec<(GuestAddress, usize)>,
}

impl Later {
    /// Answers the request and gives it back.
    fn finish(self, result: io::Result<()>) {
        let out = out_header(&self.header, result.err().as_ref(), 0);
        let written = self.write(out.as_slice());
        self.service.push(self.queue, self.head, written);
    }

    fn write(&self, mut bytes: &[u8]) -> u32 {
        let whole = bytes.len() as u32;
        for (address, len) in &self.room {
            let (part, rest) = bytes.split_at(bytes.len().min(*len));
            if self.service.memory.write_slice(part, *address).is_err() {
                return 0;
            }
            bytes = rest;
        }
        if bytes.is_empty() { whole } else { 0 }
    }
}

fn out_header(header: &InHeader, error: Option<&io::Error>, body: usize) -> OutHeader {
    OutHeader {
        len: (size_of::<OutHeader>() + body) as u32,
        error: error.map_or(0, |e| -e.raw_os_error().unwrap_or(libc::EINVAL)),
        unique: header.unique,
    }
}
