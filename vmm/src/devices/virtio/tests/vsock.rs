//! Tests of streams between a guest and the host, with real sockets on the host's side.

mod guest;
mod hostile;
mod streams;
