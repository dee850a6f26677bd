//! What config.json may say in words that the types of the `oci-spec` crate do not take.

use oci_spec::runtime::Capability;
use serde_json::Value;

/// The sets of `process.capabilities`.
const SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// Flags of `process.scheduler` as the specification spells them, and as the types do.
const SCHEDULER_FLAGS: [(&str, &str); 2] = [
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

/// Makes a `process` object one that the types take. Unknown capabilities are left out with a
/// warning, as runc does: newer kernels have more of them.
pub(super) fn correct(process: &mut Value) {
    let mut unknown = Vec::new();
    for set in SETS {
        let pointer = format!("/capabilities/{set}");
        let Some(Value::Array(names)) = process.pointer_mut(&pointer) else { continue };
        names.retain(|name| {
            // What is no text is an error of its own.
            let known =
                !name.is_string() || serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known && !unknown.contains(name) {
                unknown.push(name.clone());
            }
            known
        });
    }
    if !unknown.is_empty() {
        let names: Vec<String> = unknown.iter().map(Value::to_string).collect();
        log::warn!(
            "process.capabilities has unknown names, which are left out: {}",
            names.join(", ")
        );
    }
    if let Some(Value::Array(flags)) = process.pointer_mut("/scheduler/flags") {
        for flag in flags {
            if let Some((_, types)) = SCHEDULER_FLAGS.iter().find(|(spec, _)| flag == spec) {
                *flag = (*types).into();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Process;
    use serde_json::json;

    #[test]
    fn what_the_types_do_not_take_is_corrected() {
        let mut process = json!({
            "user": {"uid": 0, "gid": 0}, "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL", "CAP_FLY"], "ambient": ["CAP_FLY"]},
            "scheduler": {
                "policy": "SCHED_DEADLINE",
                "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]
            }
        });
        correct(&mut process);
        let capabilities = json!({"bounding": ["CAP_KILL"], "ambient": []});
        assert_eq!(process["capabilities"], capabilities);
        serde_json::from_value::<Process>(process).unwrap();
    }
}
