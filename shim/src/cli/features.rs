//! `features`: the supported parts of the runtime specification, as JSON.

use crate::{
    bundle,
    cli::print,
    error::{Explain, Result},
};

/// Prints the features structure of the specification.
pub(super) fn run() -> Result<u8> {
    let features = bundle::features();
    let json =
        serde_json::to_string_pretty(&features).explain(|| "cannot write the features".into())?;
    print(&format!("{json}\n"))?;
    Ok(0)
}
