//! Requests of rtnetlink(7). Each is answered before the next one is made.

use std::{cell::Cell, io, os::fd::OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{RouteNetlinkMessage, link::LinkMessage};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::error::{Explain, Result};

/// Size of the buffer. The kernel answers in pieces of at most 32 KiB (`netlink_dump`).
const BUFFER_LEN: usize = 64 * 1024;

/// Number of attempts to read a list, if it changes while it is read.
const MAX_DUMPS: usize = 16;

/// A connection to the kernel, about the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: Cell<u32>,
}

impl Netlink {
    /// Opens a connection about the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // None stands for NETLINK_ROUTE, which is 0.
            None,
        )
        .explain(|| "cannot open a netlink socket".into())?;
        Ok(Self { socket, sequence: Cell::new(0) })
    }

    /// All objects that `request` asks for, as they were at one moment.
    pub(super) fn dump(
        &self,
        request: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..MAX_DUMPS {
            let (found, consistent) = self.exchange(request.clone(), NLM_F_DUMP)?;
            if consistent {
                return Ok(found);
            }
        }
        Err(io::Error::other("the list changed during each attempt to read it"))
    }

    /// All interfaces.
    pub(super) fn links(&self) -> io::Result<Vec<LinkMessage>> {
        let all = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(all
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            })
            .collect())
    }

    /// Changes or removes an object.
    pub(super) fn change(&self, request: RouteNetlinkMessage) -> io::Result<()> {
        self.exchange(request, NLM_F_ACK).map(drop)
    }

    /// Makes an object. One that exists already gives `EEXIST`.
    pub(super) fn create(&self, request: RouteNetlinkMessage) -> io::Result<()> {
        self.exchange(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// Sends a request and reads its whole answer. False if a list changed while it was read.
    fn exchange(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let bytes = message(request, flags, sequence);
        send(&self.socket, &bytes, SendFlags::empty())?;
        let (mut found, mut consistent) = (Vec::new(), true);
        let mut buffer = vec![0; BUFFER_LEN];
        loop {
            let (_, length) = recv(&self.socket, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
            let mut rest =
                buffer.get(..length).ok_or_else(|| malformed("an answer is too long"))?;
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| malformed(&e.to_string()))?;
                let step = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(step..).unwrap_or_default();
                if answer.header.sequence_number != sequence {
                    continue;
                }
                consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => return Ok((found, consistent)),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) => return Ok((found, consistent)),
                    _ => {}
                }
            }
        }
    }
}

/// A request as bytes.
pub(super) fn message(request: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's answer is not understood: {why}"),
    )
}
