//! `features`: what of the runtime specification is supported, as JSON.

use super::print;
use crate::{
    bundle,
    error::{Explain, Result},
};

/// Prints the features structure of the specification.
///
/// # Errors
///
/// If it cannot be printed.
pub(super) fn run() -> Result<u8> {
    let features = bundle::features();
    let json =
        serde_json::to_string_pretty(&features).explain(|| "cannot write the features".into())?;
    print(&format!("{json}\n"))?;
    Ok(0)
}
