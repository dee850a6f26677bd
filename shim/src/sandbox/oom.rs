//! The host's choice of what to kill when its memory runs out.

use std::fs;

use crate::error::{Explain, Result};

const FILE: &str = "/proc/self/oom_score_adj";

/// Gives this process, and those that it starts from here on, the `oom_score_adj` of the container's
/// process. Without one, the caller's stays, unless that is an engine's, which protects itself by a
/// negative one: its containers are not to be protected with it.
///
/// # Errors
///
/// If the kernel refuses: a lower value than this process has needs `CAP_SYS_RESOURCE`.
pub(super) fn adjust(asked: Option<i32>) -> Result<()> {
    let text = fs::read_to_string(FILE).explain(|| format!("cannot read {FILE}"))?;
    let own: i32 = text.trim_end().parse().unwrap_or_default();
    let wanted = asked.unwrap_or_else(|| own.max(0));
    if wanted == own {
        return Ok(());
    }
    fs::write(FILE, wanted.to_string())
        .explain(|| format!("cannot set process.oomScoreAdj, which is {wanted}, on the host"))
}
