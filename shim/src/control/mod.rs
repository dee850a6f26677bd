//! The control socket of a sandbox process: requests from other invocations of `isopod`.
//!
//! Each message is a line of JSON. A connection carries requests one at a time. The answer is
//! [`Message::Done`] or [`Message::Failed`], and to [`Request::Wait`] it is [`Message::Ended`].
//!
//! `create` and `run` have a connection to the sandbox process that they started. Its first message
//! is [`Message::Created`] or [`Message::Failed`]. After that it carries the same requests and
//! answers, and [`Message::Ended`] at the end.
//!
//! Requests that change nothing go to the agent directly (`engine::query`).

pub mod client;
pub mod message;
pub mod server;
pub mod spawn;
pub mod versions;
pub mod wait;

pub use self::{
    client::{ANSWER_TIMEOUT, Answer, ask, ask_within, is_answered},
    message::{Ended, MAX_MESSAGE_LEN, Message, Request},
};
