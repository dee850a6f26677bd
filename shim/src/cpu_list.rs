//! Lists of CPUs as the kernel writes them (cpuset(7), "List format").

/// Number of CPUs in a list such as `0-3,8`, or `None` if the text is no list.
pub(crate) fn cpu_list_len(list: &str) -> Option<u64> {
    let mut total = 0u64;
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        total = total.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(cpu_list_len("0"), Some(1));
        assert_eq!(cpu_list_len("0-3,8"), Some(5));
        for bad in ["", "a", "3-1", "0,,1", "-", "0-18446744073709551615"] {
            assert_eq!(cpu_list_len(bad), None, "{bad}");
        }
    }
}
