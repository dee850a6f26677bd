//! Tests of network interfaces over real taps, each in a network namespace of its own.

mod backlog;
mod hostile;
mod offload;
mod pairs;
mod traffic;
mod wire;
