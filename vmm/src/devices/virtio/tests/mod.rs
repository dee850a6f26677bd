//! Tests of devices, driven as by a guest: registers through the bus, rings in guest memory, kicks
//! by eventfd. No test measures time. Waits are long, and end with their event.

mod block;
mod driver;
mod fs;
mod net;
mod small;
mod state;
mod transport;
mod vsock;
