//! The `isopod` command: an OCI runtime whose containers are microVMs. Under the name
//! `containerd-shim-isopod-v2` it is containerd's shim.

use std::process::ExitCode;

fn main() -> ExitCode {
    if isopod_shim::containerd::is_asked_for(std::env::args_os().next().as_deref()) {
        return isopod_shim::containerd::main();
    }
    isopod_shim::cli::main()
}
