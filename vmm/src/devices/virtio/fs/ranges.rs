//! Byte ranges of a file that an owner has locked for reading.

use std::io;

use super::host::error;

/// Most ranges of one owner. Each takes memory here and in the host's kernel.
const MAX_RANGES: usize = 1024;

/// First and last byte of each range. Ranges are sorted and do not touch each other's bytes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Adds a range. `ENOLCK` if there are too many, and then nothing changes.
    pub(super) fn add(&mut self, (mut start, mut end): (u64, u64)) -> io::Result<()> {
        let (mut all, joined): (Vec<_>, Vec<_>) =
            self.0.iter().partition(|(from, to)| *to < start || *from > end);
        for (from, to) in joined {
            (start, end) = (start.min(from), end.max(to));
        }
        if all.len() >= MAX_RANGES {
            return Err(error(libc::ENOLCK));
        }
        all.insert(all.partition_point(|range| range.0 < start), (start, end));
        self.0 = all;
        Ok(())
    }

    /// Removes a range, and with it parts of other ranges.
    pub(super) fn remove(&mut self, (start, end): (u64, u64)) {
        let rest = |&(from, to): &(u64, u64)| {
            let before = (from < start).then(|| (from, to.min(start.saturating_sub(1))));
            let behind = (to > end).then(|| (from.max(end.saturating_add(1)), to));
            [before, behind].into_iter().flatten()
        };
        self.0 = self.0.iter().flat_map(rest).collect();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(all: &[(u64, u64)]) -> Ranges {
        let mut ranges = Ranges::default();
        all.iter().for_each(|range| ranges.add(*range).unwrap());
        ranges
    }

    #[test]
    fn what_is_added_is_there_once() {
        let ranges = of(&[(10, 19), (30, 39), (0, 4), (15, 32), (50, u64::MAX)]);
        assert_eq!(ranges.0, [(0, 4), (10, 39), (50, u64::MAX)]);
    }

    #[test]
    fn what_is_removed_leaves_the_rest() {
        for (removed, left) in [
            ((12, 13), vec![(10, 11), (14, 19), (30, 39)]),
            ((0, 10), vec![(11, 19), (30, 39)]),
            ((15, 34), vec![(10, 14), (35, 39)]),
            ((0, u64::MAX), vec![]),
            ((20, 29), vec![(10, 19), (30, 39)]),
        ] {
            let mut ranges = of(&[(10, 19), (30, 39)]);
            ranges.remove(removed);
            assert_eq!(ranges.0, left, "{removed:?}");
        }
    }

    #[test]
    fn there_are_not_too_many() {
        let mut ranges = of(&(0..1024).map(|n| (3 * n, 3 * n)).collect::<Vec<_>>());
        let error = ranges.add((9000, 9000)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOLCK));
        ranges.add((0, 9000)).unwrap();
        assert_eq!(ranges.0, [(0, 9000)]);
    }
}
