//! Versions, and the features of the runtime, as the shim prints them.

use containerd_shim_protos::{
    protobuf::well_known_types::any::Any, types::introspection::RuntimeInfo,
};

use crate::{
    bundle::{SPEC_VERSION, features},
    containerd::{
        PROGRAM,
        messages::{encoded, print},
    },
    error::{Explain, Result},
};

/// Type of the features in containerd's RuntimeInfo: JSON of the runtime specification.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(super) fn print_version() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    print(format!("{PROGRAM} version {version}\nspec: {SPEC_VERSION}\n").as_bytes())
}

pub(super) fn print_features() -> Result<()> {
    let json = serde_json::to_string_pretty(&features()).explain(|| "cannot print".into())?;
    print(format!("{json}\n").as_bytes())
}

pub(super) fn print_info() -> Result<()> {
    let features =
        serde_json::to_vec(&features()).explain(|| "cannot print the features".into())?;
    let mut info = RuntimeInfo { name: "io.containerd.isopod.v2".into(), ..RuntimeInfo::default() };
    info.features =
        Some(Any { type_url: FEATURES_TYPE.into(), value: features, ..Any::default() }).into();
    print(&encoded(&info)?)
}
