//! The control socket of a sandbox process: calls from other invocations of `isopod`.
//!
//! Each message is a line of JSON. A connection carries calls one at a time. Each call names a
//! container: a pod's sandbox process has several.
//!
//! `create` and `run` have a connection to the sandbox process that they started. It carries no
//! calls: its first message is [`Message::Created`] or [`Message::Failed`], and its last is
//! [`Message::Ended`].
//!
//! `exec`, and the process of a container that lives in its pod's microVM, stay at their connection
//! until the end of the process that they stand for ([`attend`]).

pub(crate) mod attend;
pub(crate) mod client;
pub(crate) mod connection;
pub(crate) mod follow;
pub(crate) mod message;
pub(crate) mod remains;
mod serve;
pub(crate) mod server;
pub(crate) mod spawn;

pub(crate) use self::{
    client::{ANSWER_TIMEOUT, Answer, ask, ask_within, is_answered},
    message::{Call, Message, Verb},
};
