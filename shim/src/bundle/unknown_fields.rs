//! A warning about keys that the types of the OCI specification do not have. A key is unknown if
//! the parsed document, written back, lacks it.

use serde_json::Value;

/// The largest number of unknown keys that a warning names.
const MAX_NAMED: usize = 8;

/// Warns in one line about keys of `raw` that did not survive into `kept`.
pub(super) fn warn(file: &str, raw: &Value, kept: &Value) {
    let mut found = Vec::new();
    collect(raw, kept, &mut String::new(), &mut found);
    if found.is_empty() {
        return;
    }
    let more = found.len().saturating_sub(MAX_NAMED);
    found.truncate(MAX_NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    log::warn!(
        "{file} has fields that are not known and have no effect: {}{more}",
        found.join(", ")
    );
}

fn collect(raw: &Value, kept: &Value, path: &mut String, found: &mut Vec<String>) {
    match (raw, kept) {
        (Value::Object(raw), Value::Object(kept)) => {
            for (key, value) in raw {
                let length = path.len();
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
                match kept.get(key) {
                    Some(kept) => collect(value, kept, path, found),
                    // To the specification an absent key and a null are the same.
                    None if value.is_null() => {}
                    None => found.push(path.escape_debug().to_string()),
                }
                path.truncate(length);
            }
        }
        (Value::Array(raw), Value::Array(kept)) => {
            for (index, (raw, kept)) in raw.iter().zip(kept).enumerate() {
                let length = path.len();
                path.push_str(&format!("[{index}]"));
                collect(raw, kept, path, found);
                path.truncate(length);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Spec;

    fn unknown(config: &str) -> Vec<String> {
        let spec: Spec = serde_json::from_str(config).unwrap();
        let raw: Value = serde_json::from_str(config).unwrap();
        let kept = serde_json::to_value(&spec).unwrap();
        let mut found = Vec::new();
        collect(&raw, &kept, &mut String::new(), &mut found);
        found
    }

    #[test]
    fn unknown_keys_are_found_at_every_depth() {
        let found = unknown(
            r#"{"ociVersion": "1.0.2", "rooot": {}, "root": {"path": "r", "extra": 1},
                "mounts": [{"destination": "/a"}, {"destination": "/b", "opts": []}],
                "linux": {"resources": {"memory": {"limit": 1, "limmit": 2}}}, "hostname": null}"#,
        );
        assert_eq!(
            found,
            ["linux.resources.memory.limmit", "mounts[1].opts", "rooot", "root.extra"]
        );
    }

    #[test]
    fn what_runc_spec_writes_is_known() {
        let found = unknown(include_str!("testdata/runc-spec.json"));
        assert_eq!(found, Vec::<String>::new());
    }
}
