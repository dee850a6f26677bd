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
    let own = own()?;
    let wanted = asked.unwrap_or(own.max(0));
    if wanted == own {
        return Ok(());
    }
    fs::write(FILE, wanted.to_string())
        .explain(|| format!("cannot set process.oomScoreAdj, which is {wanted}, on the host"))
}

/// This process's value, unless it is negative: the value of processes that are not to be protected
/// with it.
pub(crate) fn unprotected() -> Result<i32> {
    Ok(own()?.max(0))
}

fn own() -> Result<i32> {
    let text = fs::read_to_string(FILE).explain(|| format!("cannot read {FILE}"))?;
    Ok(text.trim_end().parse().unwrap_or_default())
}
