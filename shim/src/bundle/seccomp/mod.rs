//! `linux.seccomp`, compiled to the BPF program that the guest loads.
//!
//! The container's system calls never reach the host's kernel: the filter stands between the
//! container and the guest's kernel. It is compiled here, so the guest needs neither libseccomp nor
//! a profile of a few hundred names. Where the specification says nothing, the filter is as with
//! runc.

mod abi;
mod enosys;
mod features;
mod filter;

pub use self::filter::Filter;
pub(super) use self::{
    features::{features, library_version},
    filter::compile,
};

#[cfg(test)]
mod tests;
