//! The end-to-end tests' view of a container from inside.
//!
//! Every sub-command that reports prints one JSON document on its standard output. The facts in it
//! come from system calls and /proc, never from the runtime's own description in the environment.
#![allow(clippy::expect_used, clippy::panic, reason = "a probe that cannot look has failed")]

mod access;
mod call;
mod clock;
mod directory;
mod meet;
mod memory;
mod network;
mod parallel;
mod posix;
mod report;
mod schedule;
mod shared;
mod stream;
mod subreaper;

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: isopod-probe report | mounts | files PATH... | open MODE PATH... \
    | mknod PATH MAJOR MINOR | escape DIR | list DIR | churn DIR | duplex BYTES | window | fork-bomb | clock | eat MIB | meet PATH OWN OTHER | count FILE BLOCKS | hole | parallel \
    | call ABI NUMBER[,ARG...]... | posix DIR XATTR | xattr DIR XATTR | tcp-server ADDRESS BYTES \
    | tcp-client ADDRESS BYTES | udp-server ADDRESS | udp-client ADDRESS COUNT BYTES... | subreaper DIR";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["report"] => print(&report::report()),
        ["mounts"] => print(&report::mounts()),
        ["files", ref paths @ ..] => print(&access::files(paths)),
        ["open", mode, ref paths @ ..] => print(&access::open(mode, paths)),
        ["mknod", path, major, minor] => print(&access::mknod(path, number(major), number(minor))),
        ["escape", below] => print(&access::escape(below)),
        ["list", dir] => print(&directory::list(dir)),
        ["churn", dir] => directory::churn(dir),
        ["duplex", bytes] => stream::duplex(number(bytes)),
        ["window"] => stream::window(),
        ["fork-bomb"] => memory::fork_bomb(),
        ["clock"] => clock::read(),
        ["eat", mib] => memory::eat(number(mib)),
        ["call", abi, ref calls @ ..] => print(&call::outcomes(abi, calls)),
        ["count", path, blocks] => shared::count(path, number(blocks)),
        ["meet", path, own, other] => meet::meet(path, number(own), number(other)),
        ["hole"] => print(&memory::across_the_hole()),
        ["parallel"] => print(&parallel::report()),
        ["posix", dir, xattr] => print(&posix::report(dir, xattr)),
        ["xattr", dir, name] => print(&posix::xattr(dir, name)),
        ["posix-hold", kind, path, mark] => posix::hold(kind, path, mark),
        ["posix-wait", kind, path] => posix::wait(kind, path),
        ["posix-lock", kind, path] => print(&posix::try_lock(kind, path)),
        ["posix-append", path, mark] => posix::append(path, mark),
        ["tcp-server", address, len] => network::tcp_server(address, number(len)),
        ["tcp-client", address, len] => network::tcp_client(address, number(len)),
        ["udp-server", address] => network::udp_server(address),
        ["udp-client", address, count, ref lengths @ ..] => {
            network::udp_client(address, number(count), lengths);
        }
        ["subreaper", dir] => {
            if let Err(e) = subreaper::run(Path::new(dir)) {
                eprintln!("isopod-probe subreaper: {e}");
                return ExitCode::FAILURE;
            }
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(64);
        }
    }
    ExitCode::SUCCESS
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("{text} is not a number"))
}

fn print(value: &serde_json::Value) {
    println!("{value}");
}
