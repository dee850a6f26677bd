//! Messages of protobuf, as containerd reads and writes them.

use std::{
    io::Write,
    time::{SystemTime, UNIX_EPOCH},
};

use containerd_shim_protos::protobuf::{
    Message,
    well_known_types::{any::Any, timestamp::Timestamp},
};

use crate::error::{Error, Explain, Result};

/// Packages of the messages that are passed with their type.
pub(super) const EVENTS: &str = "containerd.events";
pub(super) const CGROUPS: &str = "io.containerd.cgroups.v2";
pub(super) const RUNC: &str = "containerd.runc.v1";

/// A message of a package, with its type. containerd's type URLs have no host. The package is a
/// constant: the message's own description of itself would have to be parsed.
pub(super) fn any<M: Message>(package: &str, message: &M) -> Any {
    Any {
        type_url: format!("{package}.{}", M::NAME),
        // Fails only for a message without a required field, and version 3 has none.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// Prints bytes that containerd reads.
pub(super) fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .explain(|| "cannot write to standard output".into())
}

/// A message as bytes.
pub(super) fn encoded(message: &impl Message) -> Result<Vec<u8>> {
    message.write_to_bytes().map_err(|e| Error::new(format!("cannot write a message: {e}")))
}

/// The same message in the types of another generated module.
pub(super) fn same<From: Message, To: Message>(from: &From) -> Option<To> {
    To::parse_from_bytes(&from.write_to_bytes().ok()?).ok()
}

/// A point in time. A time before the epoch is the epoch.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::{
        cgroups_v2::metrics::Metrics, events::task::TaskExit, protobuf::MessageFull,
        shim::oci::ProcessDetails,
    };

    use super::*;

    #[test]
    fn types_have_their_full_names() {
        fn check<M: MessageFull>(package: &str) {
            assert_eq!(any(package, &M::new()).type_url, M::descriptor().full_name());
        }
        check::<TaskExit>(EVENTS);
        check::<Metrics>(CGROUPS);
        check::<ProcessDetails>(RUNC);
    }
}
