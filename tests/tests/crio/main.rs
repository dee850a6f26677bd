//! CRI-O's calls, in the order in which CRI-O makes them. There is no CRI-O here: for each of its
//! runtime types the tests do what its sources do (`internal/oci`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

mod pinned_pod;
mod ttrpc;
mod type_oci;
mod type_vm;
mod vm_container;
