//! Annotations of Isopod's own in config.json: those that exist, and those that a tenant may set.

use oci_spec::runtime::Spec;

use super::vm_size::{MEMORY_ANNOTATION, NESTED_ANNOTATION, NICS_ANNOTATION, VCPUS_ANNOTATION};
use crate::{
    error::{Error, Result},
    settings::CONFIG_FILE,
};

/// Beginning of the names of Isopod's own annotations.
pub const ANNOTATION_PREFIX: &str = "dev.isopod.";

/// All annotations that config.json may have of Isopod's own.
pub const ANNOTATIONS: [&str; 4] =
    [MEMORY_ANNOTATION, NESTED_ANNOTATION, VCPUS_ANNOTATION, NICS_ANNOTATION];

/// Refuses an annotation with the prefix of Isopod's own that does not exist. Without that, a
/// misspelt name would have no effect.
pub(super) fn check(spec: &Spec) -> Result<()> {
    match own(spec).find(|name| !ANNOTATIONS.contains(name)) {
        Some(name) => Err(Error::new(format!(
            "annotation {name:?} is not known; there are {}",
            ANNOTATIONS.join(", ")
        ))),
        None => Ok(()),
    }
}

/// Refuses annotations of Isopod's own that are not in `allowed`, which has names of
/// [`ANNOTATIONS`]. For callers whose config.json has annotations of a tenant.
///
/// # Errors
///
/// Names the annotation, or a name in `allowed` that does not exist.
pub fn check_allowed(spec: &Spec, allowed: &[String]) -> Result<()> {
    check_allowed_list(allowed)?;
    match own(spec).find(|name| !allowed.iter().any(|allowed| allowed == name)) {
        Some(name) => Err(Error::new(format!(
            "annotation {name} is not allowed for pods on this host: remove it, or have the \
             operator add it to allowed_annotations in {CONFIG_FILE}"
        ))),
        None => Ok(()),
    }
}

/// Refuses a value of the key `allowed_annotations` that has a name not in [`ANNOTATIONS`].
///
/// # Errors
///
/// Names the entry.
pub fn check_allowed_list(allowed: &[String]) -> Result<()> {
    match allowed.iter().find(|name| !ANNOTATIONS.contains(&name.as_str())) {
        Some(name) => Err(Error::new(format!(
            "allowed_annotations in {CONFIG_FILE} has {name:?}, which is no annotation of isopod; \
             there are {}",
            ANNOTATIONS.join(", ")
        ))),
        None => Ok(()),
    }
}

/// Names of the annotations with the prefix of Isopod's own, in their order, so that an error
/// always names the same one.
fn own(spec: &Spec) -> impl Iterator<Item = &str> {
    let names = spec.annotations().iter().flatten().map(|(name, _)| name.as_str());
    let mut own: Vec<&str> = names.filter(|name| name.starts_with(ANNOTATION_PREFIX)).collect();
    own.sort_unstable();
    own.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(annotations: &str) -> Spec {
        serde_json::from_str(&format!(
            r#"{{"ociVersion": "1.0.2", "annotations": {{{annotations}}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn an_unknown_annotation_of_our_own_is_refused_by_name() {
        check(&spec(r#""dev.isopod.vcpus": "1", "com.example.x": "y""#)).unwrap();
        let error = check(&spec(r#""dev.isopod.vcpus": "1", "dev.isopod.memory": "1""#));
        let message = error.unwrap_err().message;
        assert!(message.starts_with(r#"annotation "dev.isopod.memory" is not known"#), "{message}");
        assert!(message.contains(MEMORY_ANNOTATION), "{message}");
    }

    #[test]
    fn a_tenant_sets_only_what_the_operator_has_listed() {
        let all = spec(r#""dev.isopod.vcpus": "1", "dev.isopod.nested": "true", "x": "y""#);
        let allowed = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            check_allowed(&all, &names).map_err(|error| error.message)
        };
        allowed(&[VCPUS_ANNOTATION, NESTED_ANNOTATION]).unwrap();
        let message = allowed(&[VCPUS_ANNOTATION]).unwrap_err();
        assert!(message.starts_with("annotation dev.isopod.nested is not allowed"), "{message}");
        assert!(allowed(&[]).unwrap_err().contains("dev.isopod.nested"));
        assert!(allowed(&["dev.isopod.*"]).unwrap_err().contains(r#"has "dev.isopod.*", which"#));
        check_allowed(&spec(r#""x": "y""#), &[]).unwrap();
    }
}
