//! Bytes that both ends of a stream can make and check. A lost, doubled or swapped byte is noticed.

use std::io::{self, Read};

/// A finite stream of bytes that do not repeat. Two streams with different seeds differ.
#[derive(Debug, Clone)]
pub struct Pattern {
    seed: u64,
    at: u64,
    len: u64,
}

impl Pattern {
    /// A stream of `len` bytes.
    pub fn new(seed: u64, len: u64) -> Self {
        Self { seed, at: 0, len }
    }

    fn word(&self, index: u64) -> [u8; 8] {
        // The finalizer of splitmix64: neighbouring words have nothing in common.
        let mut z = (self.seed << 40).wrapping_add(index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).to_le_bytes()
    }
}

impl Read for Pattern {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len - self.at).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        let mut done = 0;
        while done < len {
            let word = self.word(self.at / 8);
            let skip = usize::try_from(self.at % 8).unwrap_or(0);
            let take = (8 - skip).min(len - done);
            buf[done..done + take].copy_from_slice(&word[skip..skip + take]);
            done += take;
            self.at += take as u64;
        }
        Ok(len)
    }
}

/// Reads `source` to its end and compares it with `pattern`.
///
/// # Errors
///
/// The offset and kind of the first difference, or the error of `source`.
pub fn compare(mut pattern: Pattern, mut source: impl Read) -> Result<(), String> {
    let mut got = vec![0; 64 * 1024];
    let mut want = vec![0; 64 * 1024];
    let mut at = 0_u64;
    loop {
        let len = source.read(&mut got).map_err(|e| format!("after {at} bytes: {e}"))?;
        let expected = pattern.read(&mut want[..len]).map_err(|e| e.to_string())?;
        if expected < len {
            return Err(format!("more than the {} bytes that were sent", pattern.len));
        }
        if got[..len] != want[..len] {
            let offset = (0..len).find(|&i| got[i] != want[i]).unwrap_or(0);
            return Err(format!("first wrong byte at offset {}", at + offset as u64));
        }
        at += len as u64;
        if len == 0 {
            return if at == pattern.len {
                Ok(())
            } else {
                Err(format!("ended after {at} of {} bytes", pattern.len))
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_equals_itself_however_it_is_cut() {
        let mut bytes = Vec::new();
        Pattern::new(1, 100_001).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 100_001);
        let mut cut = vec![0; 100_001];
        let mut pattern = Pattern::new(1, 100_001);
        for chunk in cut.chunks_mut(7) {
            pattern.read_exact(chunk).unwrap();
        }
        assert_eq!(bytes, cut);
        compare(Pattern::new(1, 100_001), &bytes[..]).unwrap();
    }

    #[test]
    fn what_is_lost_changed_or_added_is_found() {
        let mut bytes = Vec::new();
        Pattern::new(1, 4096).read_to_end(&mut bytes).unwrap();
        assert!(compare(Pattern::new(2, 4096), &bytes[..]).unwrap_err().contains("offset 0"));
        assert!(compare(Pattern::new(1, 4096), &bytes[..4000]).unwrap_err().contains("4000 of"));
        bytes[4095] ^= 1;
        assert!(compare(Pattern::new(1, 4096), &bytes[..]).unwrap_err().contains("offset 4095"));
        bytes.push(0);
        assert!(compare(Pattern::new(1, 4096), &bytes[..]).is_err());
    }
}
