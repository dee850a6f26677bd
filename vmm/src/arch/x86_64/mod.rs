//! The x86-64 machine: memory layout, CPUID, boot state, registers.

pub mod boot;
pub mod cpuid;
pub mod ioapic;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod regs;
pub mod state;
