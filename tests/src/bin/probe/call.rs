//! System calls by number, past the C library.

use serde_json::{Map, Value, json};

use crate::access::name;

/// The result of each call: a number, or the name of the error. A call is its number and arguments,
/// separated by commas. `abi` is `64`, `x32` or `32` (the ABI of 32-bit programs).
pub(crate) fn outcomes(abi: &str, calls: &[&str]) -> Value {
    let outcome = |text: &str| {
        let mut numbers = [0_u64; 7];
        for (place, part) in numbers.iter_mut().zip(text.split(',')) {
            *place = crate::number(part);
        }
        let result = match abi {
            "64" => native(numbers),
            // __X32_SYSCALL_BIT marks the calls of this ABI.
            "x32" => native(
                [&[numbers[0] | 0x4000_0000], &numbers[1..]]
                    .concat()
                    .try_into()
                    .expect("seven numbers"),
            ),
            "32" => in_32_bits(numbers),
            other => panic!("no ABI {other}"),
        };
        match i32::try_from(-result) {
            Ok(errno @ 1..4096) => json!(name(errno)),
            _ => json!(result),
        }
    };
    calls.iter().map(|&call| (call.to_owned(), outcome(call))).collect::<Map<_, _>>().into()
}

fn native([number, a, b, c, d, e, f]: [u64; 7]) -> i64 {
    let result: i64;
    // SAFETY: the calls that tests make take numbers, or pointers that are null.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    result
}

/// Makes a call by interrupt 0x80, the entry of 32-bit programs, open to any program. Passes three
/// arguments, enough for the tests.
fn in_32_bits([number, a, b, c, ..]: [u64; 7]) -> i64 {
    let result: u64;
    // SAFETY: the calls take numbers, or pointers that are null. `rbx` is reserved by the compiler,
    // so it is restored.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {a}",
            "int 0x80",
            "xchg rbx, {a}",
            a = inout(reg) a => _,
            inlateout("rax") number => result,
            in("rcx") b, in("rdx") c,
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
    i64::from((result & 0xffff_ffff) as u32 as i32)
}
