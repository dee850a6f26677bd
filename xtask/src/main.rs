//! Developer commands: `cargo xtask COMMAND`.

mod apt;
mod bench;
mod build;
mod bundle;
mod cache;
mod demo;
mod dependencies;
mod deploy_image;
#[cfg(test)]
mod floors;
mod image;
mod install;
mod kernel;
mod lab;
mod process;
mod progress;
mod repository;
mod target;
mod test;
mod timed;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;

const HELP: &str = "\
Usage: cargo xtask COMMAND [...]

  demo      build everything and run an OCI bundle in a microVM
  test      run the unit tests and the end-to-end tests
  build     build binaries, guest kernel and guest image into target/isopod
  kernel    build the guest kernel only
  image     build the guest image only
  install   build, and install below /usr/local
  deploy-image
            build the image that installs Isopod on nodes of Kubernetes
  bench     run a benchmark, in a lab that counts instructions
  lab       boot a machine with nested KVM and run commands in it

`cargo xtask COMMAND --help` says more. Missing Debian packages are installed.";

fn main() -> ExitCode {
    match run() {
        // An exit status is a byte.
        Ok(status) => ExitCode::from((status & 0xff) as u8),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the command named by the arguments. Returns the exit status of this process.
fn run() -> Result<i32> {
    let mut args = lexopt::Parser::from_env();
    let command = match args.next()? {
        Some(Value(word)) => word.string()?,
        Some(Long("help") | Short('h')) => {
            println!("{HELP}");
            return Ok(0);
        }
        Some(other) => return Err(other.unexpected().into()),
        None => bail!("which command?\n{HELP}"),
    };
    match command.as_str() {
        "demo" => demo::main(args),
        "test" => test::main(args),
        "build" => build::main(args, build::BUILD_HELP, build::build),
        "kernel" => build::main(args, build::KERNEL_HELP, build::kernel),
        "image" => build::main(args, build::IMAGE_HELP, build::image),
        "install" => install::main(args),
        "deploy-image" => build::main(args, deploy_image::HELP, deploy_image::build),
        "bench" => bench::main(args),
        "lab" => lab::cli::main(args),
        // Programs of the lab itself: its PID 1 and the servers of its ports; see lab/init.rs.
        "lab-init" => lab::init::main().map(|()| 0),
        "lab-port" => {
            let device = args.next()?.context("lab-port needs a device")?;
            let Value(device) = device else { return Err(device.unexpected().into()) };
            lab::init::serve_port(device.as_ref()).map(|()| 0)
        }
        _ => bail!("there is no command `{command}`\n{HELP}"),
    }
}
