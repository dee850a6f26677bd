//! The `isopod` command: an OCI runtime whose containers are microVMs.

use std::process::ExitCode;

fn main() -> ExitCode {
    isopod_shim::cli::main()
}
