//! The host's choice of a process to kill when its memory runs out (`oom_score_adj`).

use std::fs;

use crate::error::{Explain, Result};

const FILE: &str = "/proc/self/oom_score_adj";

/// Gives this process, and the processes that it starts from now on, the `oom_score_adj` of the
/// container's process. Without one the caller's value stays, unless it is negative. An engine
/// protects itself by a negative value, and its containers are not to be protected with it.
///
/// A value below the present one needs `CAP_SYS_RESOURCE`.
pub(crate) fn adjust(asked: Option<i32>) -> Result<()> {
    let text = fs::read_to_string(FILE).explain(|| format!("cannot read {FILE}"))?;
    let own: i32 = text.trim_end().parse().unwrap_or_default();
    let wanted = asked.unwrap_or_else(|| own.max(0));
    if wanted == own {
        return Ok(());
    }
    fs::write(FILE, wanted.to_string())
        .explain(|| format!("cannot set process.oomScoreAdj, which is {wanted}, on the host"))
}
