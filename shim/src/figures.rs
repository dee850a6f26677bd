//! Figures of a sandbox for its operator, as its process reports them.
//!
//! The VMM's figures may be any, once a guest has taken the VMM over. So they are bounded, and the
//! names among them are checked.

use std::collections::BTreeMap;

use isopod_vmm::control::VmmReply;
use serde::{Deserialize, Serialize};

use crate::call_times::CallTimes;

/// Most names of one kind that are taken from the VMM.
const MAX_NAMES: usize = 256;

/// Longest name that is taken from the VMM, in bytes.
const MAX_NAME_LEN: usize = 64;

/// All figures that the process of a sandbox reports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Times of calls.
    pub(crate) calls: Vec<CallTimes>,
    /// Figures of the VMM; `None` if it does not answer.
    pub(crate) vmm: Option<VmmFigures>,
}

/// Figures of a VMM since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmmFigures {
    /// VM exits by kind: `kvm:` has those that KVM has counted, `user:` those to the VMM.
    pub(crate) exits: BTreeMap<String, u64>,
    /// Resident memory of the VMM without guest memory, in KiB.
    pub(crate) overhead_kib: u64,
    /// Resident guest memory, in KiB.
    pub(crate) guest_resident_kib: u64,
    /// Requests to the shared directories, by class.
    pub(crate) fs_requests: BTreeMap<String, u64>,
    /// Bytes of the streams to the guest.
    pub(crate) stream_bytes_to_guest: u64,
    /// Bytes of the streams from the guest.
    pub(crate) stream_bytes_to_host: u64,
}

impl VmmFigures {
    /// The figures in an answer of the VMM, if it has any.
    pub(crate) fn of(reply: VmmReply) -> Option<Self> {
        let VmmReply::Status {
            exits,
            overhead_kib,
            guest_resident_kib,
            fs_requests,
            stream_bytes_to_guest,
            stream_bytes_to_host,
            ..
        } = reply
        else {
            return None;
        };
        Some(Self {
            exits: named(exits),
            overhead_kib,
            guest_resident_kib,
            fs_requests: named(fs_requests),
            stream_bytes_to_guest,
            stream_bytes_to_host,
        })
    }
}

fn named(counts: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let is_name = |name: &String| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '-');
        name.len() <= MAX_NAME_LEN && name.chars().all(allowed)
    };
    counts.into_iter().filter(|(name, _)| is_name(name)).take(MAX_NAMES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_vmm_are_names() {
        let counts = |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), 1)).collect();
        let reply = VmmReply::Status {
            paused: false,
            exits: counts(&["kvm:io_exits", "user:port-in", "a\"} 1\nb", &"x".repeat(65)]),
            overhead_kib: 1,
            guest_resident_kib: 2,
            fs_requests: (0..1000).map(|n| (format!("n{n}"), 1)).collect(),
            stream_bytes_to_guest: 3,
            stream_bytes_to_host: 4,
        };
        let figures = VmmFigures::of(reply).unwrap();
        assert_eq!(figures.exits, counts(&["kvm:io_exits", "user:port-in"]));
        assert_eq!((figures.fs_requests.len(), figures.stream_bytes_to_host), (MAX_NAMES, 4));
        assert_eq!(VmmFigures::of(VmmReply::Done), None);
    }
}
