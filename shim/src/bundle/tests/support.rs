//! Checks that docs/oci-support.md has a true row for every field, and no other row.

use std::{collections::BTreeMap, fs, path::Path};

use oci_spec::runtime::Spec;
use serde_json::{Map, Value, json};

use crate::bundle::{Bundle, tests::fields};

const TABLE: &str = include_str!("../../../../docs/oci-support.md");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Support {
    Honoured,
    Refused,
    NoEffect,
}

struct Row {
    /// Paths of the fields, with braces resolved.
    fields: Vec<String>,
    support: Support,
    how: &'static str,
}

fn rows() -> Vec<Row> {
    let lines = TABLE.lines().filter(|line| line.starts_with("| `"));
    lines
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let [field, support, how] = cells[..] else { panic!("three cells: {line}") };
            let support = match support {
                "honoured" => Support::Honoured,
                "refused" => Support::Refused,
                "no effect" => Support::NoEffect,
                other => panic!("no support: {other}"),
            };
            Row { fields: alternatives(field.trim_matches('`')), support, how }
        })
        .collect()
}

/// Resolves `a.{b,c}.d` to `a.b.d` and `a.c.d`.
fn alternatives(text: &str) -> Vec<String> {
    let Some((head, rest)) = text.split_once('{') else { return vec![text.to_owned()] };
    let (inside, tail) = rest.split_once('}').expect("a closing brace");
    let tails = alternatives(tail);
    let all = inside.split(',').flat_map(|one| tails.iter().map(move |tail| (one, tail)));
    all.map(|(one, tail)| format!("{head}{one}{tail}")).collect()
}

/// Tells whether the field of a row covers `path`.
fn covers(listed: &str, path: &str) -> bool {
    match listed.strip_suffix(".**") {
        Some(root) => path
            .strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || rest.starts_with('[')),
        None => listed == path,
    }
}

/// Fields that hold a value and no further fields.
fn leaves() -> BTreeMap<String, Value> {
    let all = fields::of::<Spec>();
    let inner = |path: &str| {
        let below = [format!("{path}."), format!("{path}[]."), format!("{path}[]")];
        all.keys().any(|other| below.iter().any(|start| other.starts_with(start.as_str())))
    };
    all.iter().filter(|(path, _)| !inner(path)).map(|(p, v)| (p.clone(), v.clone())).collect()
}

#[test]
fn every_field_is_in_the_table_once_and_no_other() {
    let listed: Vec<String> = rows().into_iter().flat_map(|row| row.fields).collect();
    let all = fields::of::<Spec>();
    for path in leaves().keys() {
        let found: Vec<&String> = listed.iter().filter(|field| covers(field, path)).collect();
        assert_eq!(found.len(), 1, "{path} is in the table as {found:?}");
    }
    for field in &listed {
        let root = field.strip_suffix(".**").unwrap_or(field);
        assert!(all.contains_key(root), "the table has {field}, which no type has");
    }
}

#[test]
fn what_is_honoured_names_tests_that_are_there() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests");
    for row in rows().iter().filter(|row| row.support == Support::Honoured) {
        let names: Vec<&str> =
            row.how.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
        assert!(!names.is_empty(), "{:?} names no test", row.fields);
        for name in names {
            let (program, test) = name.split_once("::").unwrap();
            let text = fs::read_to_string(folder.join(format!("{program}.rs"))).unwrap();
            let test = format!("#[test]\nfn {test}() {{");
            assert!(text.contains(&test), "{:?}: there is no test {name}", row.fields);
        }
    }
}

/// Loads a bundle with the field `path`, beside those that a bundle needs to be loaded.
fn load_with(path: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    let mut config: Value =
        serde_json::from_str(include_str!("../testdata/runc-spec.json")).unwrap();
    config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    config["linux"]["personality"] = json!({"domain": "LINUX"});
    let mut at = &mut config;
    for part in path.split('.') {
        let (name, item) = part.strip_suffix("[]").map_or((part, false), |name| (name, true));
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[name];
        if item {
            at = &mut at[0];
        }
    }
    *at = fields::of::<Spec>()[path].clone();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Bundle::load(dir.path(), None).map(drop).map_err(|error| error.message)
}

#[test]
fn what_is_refused_is_refused_by_its_name() {
    for row in rows().iter().filter(|row| row.support == Support::Refused) {
        for field in &row.fields {
            let path = field.strip_suffix(".**").unwrap_or(field);
            let message = load_with(path).expect_err(path);
            let name = path.replace("[]", "[0]");
            assert!(message.contains(&name), "{path}: {message}");
        }
    }
}

#[test]
fn what_has_no_effect_is_accepted() {
    for row in rows().iter().filter(|row| row.support == Support::NoEffect) {
        for field in &row.fields {
            let path = field.strip_suffix(".**").unwrap_or(field);
            assert_eq!(load_with(path), Ok(()), "{path}");
        }
    }
}
