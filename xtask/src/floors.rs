//! Floors of the crates: an import goes down, never up and never in a circle.
//!
//! Read from the `use` items of each crate. Code of tests is left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use syn::{Attribute, Item, UseName, UseRename, UseTree};

use crate::repository;

/// Folders of the crates whose modules must not import in a circle.
const CRATES: [&str; 7] = ["agent", "bench", "rootfs-builder", "shim", "tests", "vmm", "xtask"];

/// Floors of `shim/`, from the top. A module imports from the floors below its own only. All modules
/// that are not named here are on the ground, where no floor is known.
const FLOORS: [&[&str]; 7] = [
    &["cli", "containerd"],
    &["sandbox_process"],
    &["control"],
    &["engine"],
    &["microvm"],
    &["cgroup", "image", "install", "network", "state"],
    &["bundle"],
];

/// A module's path within its crate: empty for the crate's root.
type ModulePath = Vec<String>;

/// Imports of each module of a crate: the modules that it imports from.
type Imports = BTreeMap<ModulePath, BTreeSet<ModulePath>>;

#[test]
fn no_import_goes_in_a_circle() {
    let circles: Vec<String> = CRATES
        .iter()
        .filter_map(|name| {
            circle(&imports(&source(name))).map(|circle| format!("{name}: {circle}"))
        })
        .collect();
    assert!(circles.is_empty(), "imports in a circle:\n{}", circles.join("\n"));
}

#[test]
fn no_import_of_the_shim_goes_up() {
    let up = upward(&imports(&source("shim")));
    assert!(up.is_empty(), "imports that go up:\n{}", up.join("\n"));
}

#[test]
fn what_goes_up_or_round_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("lib.rs", "mod bundle; mod clock; mod engine;");
    write("clock.rs", "pub struct Clock;");
    write("bundle/mod.rs", "mod bind; pub use self::bind::Bind; use crate::clock::Clock;");
    write("bundle/bind.rs", "use std::fs; pub struct Bind;");
    write("engine.rs", "use crate::{bundle::Bind, clock};");
    let fine = imports(dir.path());
    assert_eq!((circle(&fine), upward(&fine)), (None, Vec::new()));

    write("bundle/bind.rs", "#[cfg(test)] mod tests { use super::super::x; } use super::{Other};");
    let round = circle(&imports(dir.path())).unwrap();
    assert_eq!(round, "bundle -> bundle::bind -> bundle");
    write("bundle/bind.rs", "use crate::{clock, engine::{self, Thing as _}};");
    assert_eq!(upward(&imports(dir.path())), ["bundle::bind imports engine"]);
    write("clock.rs", "use super::bundle::*;");
    let up = upward(&imports(dir.path()));
    assert_eq!(up, ["bundle::bind imports engine", "clock imports bundle"]);
}

/// The source folder of a crate of this repository.
fn source(name: &str) -> std::path::PathBuf {
    repository::root().join(name).join("src")
}

/// Reads the imports of all modules below a source folder.
fn imports(source: &Path) -> Imports {
    let mut files = BTreeMap::new();
    collect(source, &mut Vec::new(), &mut files);
    let modules: BTreeSet<ModulePath> = files.keys().cloned().collect();
    let mut imports = Imports::new();
    for (module, texts) in &files {
        let mut found = Vec::new();
        for text in texts {
            of_items(&syn::parse_file(text).unwrap().items, module, &mut found);
        }
        let targets = found.iter().filter_map(|path| target(path, &modules));
        let others = targets.filter(|target| target != module).collect();
        imports.insert(module.clone(), others);
    }
    imports
}

/// Reads all files of a folder that is a module or a crate's root.
fn collect(folder: &Path, module: &mut ModulePath, files: &mut BTreeMap<ModulePath, Vec<String>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        // Files of tests may import whatever they test.
        if stem == "tests" || stem == "bin" {
            continue;
        }
        if path.is_dir() {
            module.push(stem);
            collect(&path, module, files);
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let mut of_file = module.clone();
            if !matches!(&*stem, "lib" | "main" | "mod") {
                of_file.push(stem);
            }
            let text = fs::read_to_string(&path).unwrap();
            // A crate of a library and a program has two roots.
            files.entry(of_file).or_default().push(text);
        }
    }
}

/// Adds the imports of items, as paths from the crate's root.
fn of_items(items: &[Item], module: &[String], found: &mut Vec<ModulePath>) {
    for item in items {
        match item {
            Item::Use(item) if !is_test(&item.attrs) => {
                of_tree(&item.tree, &mut Vec::new(), module, found);
            }
            Item::Mod(item) if !is_test(&item.attrs) => {
                let inner = [module, &[item.ident.to_string()]].concat();
                let items = item.content.as_ref().map(|(_, items)| items.as_slice());
                of_items(items.unwrap_or_default(), &inner, found);
            }
            _ => {}
        }
    }
}

/// Adds the imports of one tree of a `use` item.
fn of_tree(
    tree: &UseTree,
    before: &mut Vec<String>,
    module: &[String],
    found: &mut Vec<ModulePath>,
) {
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            of_tree(&path.tree, before, module, found);
            before.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                of_tree(tree, before, module, found);
            }
        }
        UseTree::Glob(_) => found.extend(absolute(before, module)),
        UseTree::Name(UseName { ident }) | UseTree::Rename(UseRename { ident, .. }) => {
            found.extend(absolute(&[&before[..], &[ident.to_string()]].concat(), module));
        }
    }
}

/// A path from the crate's root; none if it leads to another crate.
fn absolute(path: &[String], module: &[String]) -> Option<ModulePath> {
    let (first, mut rest) = path.split_first()?;
    let mut base = module.to_vec();
    match &**first {
        "crate" => base.clear(),
        "self" => {}
        "super" => {
            base.pop();
            while let Some(("super", more)) =
                rest.split_first().map(|(first, more)| (&**first, more))
            {
                base.pop();
                rest = more;
            }
        }
        _ => return None,
    }
    base.extend(rest.iter().filter(|part| *part != "self").cloned());
    Some(base)
}

/// The module that an imported path belongs to.
fn target(path: &[String], modules: &BTreeSet<ModulePath>) -> Option<ModulePath> {
    (0..=path.len()).rev().map(|length| path[..length].to_vec()).find(|path| modules.contains(path))
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .meta
                .require_list()
                .is_ok_and(|list| list.tokens.to_string().trim() == "test")
    })
}

/// The first circle of imports, as text.
fn circle(imports: &Imports) -> Option<String> {
    let mut done = BTreeSet::new();
    imports.keys().find_map(|module| circle_from(module, imports, &mut Vec::new(), &mut done))
}

fn circle_from<'a>(
    module: &'a ModulePath,
    imports: &'a Imports,
    path: &mut Vec<&'a ModulePath>,
    done: &mut BTreeSet<&'a ModulePath>,
) -> Option<String> {
    if let Some(start) = path.iter().position(|before| *before == module) {
        let names = path[start..].iter().chain([&module]).map(|module| name(module));
        return Some(names.collect::<Vec<_>>().join(" -> "));
    }
    if done.contains(module) {
        return None;
    }
    path.push(module);
    let found = imports.get(module)?.iter().find_map(|next| circle_from(next, imports, path, done));
    path.pop();
    done.insert(module);
    found
}

/// The imports that go to the same floor or to one above, as text.
fn upward(imports: &Imports) -> Vec<String> {
    let floor = |module: &ModulePath| {
        let top = module.first()?;
        FLOORS.iter().rev().position(|floor| floor.contains(&&**top))
    };
    let pairs = imports.iter().flat_map(|(from, all)| all.iter().map(move |to| (from, to)));
    pairs
        .filter(|(from, to)| {
            // The root only lists the others.
            !from.is_empty()
                && from.first() != to.first()
                && floor(to) >= floor(from)
                && floor(to).is_some()
        })
        .map(|(from, to)| format!("{} imports {}", name(from), name(to)))
        .collect()
}

fn name(module: &[String]) -> String {
    if module.is_empty() { "the root".to_owned() } else { module.join("::") }
}
