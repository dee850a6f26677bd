//! Devices driven as a guest would: registers through the bus, rings laid out in guest memory, kicks
//! by eventfd. Nothing here is timed; waits are long and end with what they wait for.

mod block;
mod driver;
mod fs;
mod net;
mod small;
mod state;
mod transport;
mod vsock;
