//! System calls that are newer than a profile.
//!
//! C libraries try a new system call, and fall back to an old one if the kernel answers `ENOSYS`. A
//! profile cannot name a system call that is newer than itself. So a profile whose default is an
//! error or worse would break the C libraries with every new kernel.
//!
//! As with runc, instructions in front of the filter answer `ENOSYS` to a number above all those
//! that the profile names.

use super::abi::Abi;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// Bit in the number of each x32 system call. The architecture of x32 is that of the 64-bit calls.
const X32_BIT: u32 = 0x4000_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const IF_ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// `SECCOMP_RET_ERRNO | ENOSYS`.
const RETURN_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();

/// Instructions to put in front of a filter. `last` has the largest number that the filter names
/// for each ABI. All other system calls fall through to the filter.
pub(super) fn stub(last: &[(Abi, u32)]) -> Vec<u64> {
    let of = |abi: Abi| last.iter().find(|(known, _)| *known == abi).map(|(_, number)| *number);
    let mut sections = Vec::new();
    if let Some(last) = of(Abi::X86) {
        sections.push((AUDIT_ARCH_I386, number_above(last).to_vec()));
    }
    let (native, x32) = (of(Abi::X8664), of(Abi::X32));
    if native.is_some() || x32.is_some() {
        sections.push((AUDIT_ARCH_X86_64, number_above_by_mode(native, x32).to_vec()));
    }
    if sections.is_empty() {
        return Vec::new();
    }
    // From the end, because a section has to jump over all sections behind it.
    let mut stub = Vec::new();
    for (architecture, mut section) in sections {
        let over = u32::try_from(stub.len()).unwrap_or(0);
        section.push(instruction(JUMP, 0, 0, over));
        let length = u8::try_from(section.len()).unwrap_or(0);
        let mut all = vec![instruction(IF_EQUAL, 0, length, architecture)];
        all.extend(section);
        all.extend(stub);
        stub = all;
    }
    stub.insert(0, instruction(LOAD, 0, 0, ARCHITECTURE));
    stub
}

fn number_above(last: u32) -> [u64; 3] {
    [
        instruction(LOAD, 0, 0, NUMBER),
        instruction(IF_GREATER, 0, 1, last),
        instruction(RETURN, 0, 0, RETURN_ENOSYS),
    ]
}

/// Instructions for 64-bit and x32 calls. An ABI that the profile does not list has no last number,
/// so its calls go to the filter.
fn number_above_by_mode(native: Option<u32>, x32: Option<u32>) -> [u64; 5] {
    [
        instruction(LOAD, 0, 0, NUMBER),
        instruction(IF_ANY_BIT, 1, 0, X32_BIT),
        instruction(IF_GREATER, 1, 2, native.unwrap_or(u32::MAX)),
        instruction(IF_GREATER, 0, 1, x32.unwrap_or(u32::MAX)),
        instruction(RETURN, 0, 0, RETURN_ENOSYS),
    ]
}

/// A `struct sock_filter` (linux/filter.h): code, jump offset if true, jump offset if false,
/// constant.
fn instruction(code: u16, if_true: u8, if_false: u8, constant: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&code.to_ne_bytes());
    bytes[2] = if_true;
    bytes[3] = if_false;
    bytes[4..].copy_from_slice(&constant.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}
