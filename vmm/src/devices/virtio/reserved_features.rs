//! Feature bits of the rings and the transport, which belong to no device type (6).

pub(super) const FEATURE_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const FEATURE_EVENT_IDX: u64 = 1 << 29;
pub(super) const FEATURE_VERSION_1: u64 = 1 << 32;
