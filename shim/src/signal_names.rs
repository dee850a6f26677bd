//! Signals by name and number, as `kill` takes them.

use crate::error::{Error, Result};

/// Names of the standard signals of Linux on x86-64, in order from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// First and last real-time signal as the C library counts them. It keeps 32 and 33 for itself.
const RT_MIN: u32 = 34;
const RT_MAX: u32 = 64;

/// Parses a number from 0 to 64, or a name with or without `SIG`, in either case. Signal 0 only
/// asks whether the process exists (kill(2)).
pub fn parse(text: &str) -> Result<u32> {
    let unknown = || Error::new(format!("unknown signal {text:?}"));
    if let Ok(number) = text.parse::<u32>() {
        return if number <= RT_MAX { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(index) = NAMES.iter().position(|known| *known == name) {
        return u32::try_from(index + 1).map_err(|_| unknown());
    }
    match name {
        "POLL" => return Ok(29),
        "IOT" => return Ok(6),
        "CLD" => return Ok(17),
        _ => {}
    }
    let (base, offset) = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => (RT_MIN, rest),
        (_, Some(rest)) => (RT_MAX, rest),
        _ => return Err(unknown()),
    };
    let offset: i64 = if offset.is_empty() { 0 } else { offset.parse().map_err(|_| unknown())? };
    u32::try_from(i64::from(base) + offset)
        .ok()
        .filter(|number| (RT_MIN..=RT_MAX).contains(number))
        .ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_of_runcs_callers_are_known() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("0", 0),
            ("64", 64),
            ("SIGRTMIN+3", 37),
            ("RTMAX-14", 50),
            ("SIGIO", 29),
            ("SIGSYS", 31),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "65", "-9", "SIGNOPE", "SIG", "RTMIN+31", "RTMAX+1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
