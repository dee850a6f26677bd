//! The choice of tests on the command line.

/// The tests to run.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    /// Unit tests.
    pub(super) unit: bool,
    /// End-to-end tests.
    pub(super) e2e: bool,
    /// Runs proven cases with runc again.
    pub(super) proofs: bool,
    /// Runs nothing, and writes the proofs of the cache to the repository.
    pub(super) record: bool,
    /// Part of the names of the tests.
    pub(super) filter: Option<String>,
}

impl Choice {
    /// Tells if proofs of earlier runs count. They do not if the filter asks for cases with runc.
    pub(super) fn remembers(&self) -> bool {
        !self.proofs && !self.filter.as_deref().is_some_and(|filter| filter.contains("runc::"))
    }
}
