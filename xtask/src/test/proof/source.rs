//! The sources that are inputs of a proof: those of the case, of the harness, and of the program.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::repository;

/// Folder of the cases.
const CASES: &str = "src/engine/cases";

/// Folder of the programs. A program may be a folder with modules of its own.
const PROGRAMS: &str = "tests";

/// Files with tables of cases. They are no input of a proof by themselves.
const TABLES: [&str; 2] = ["mod.rs", "main.rs"];

/// Beginnings of the line of a case's function.
const FUNCTIONS: [&str; 2] = ["pub fn ", "pub(crate) fn "];

/// Files of the harness that only other tests use.
const ASIDE: [&str; 4] = ["src/container.rs", "src/netns.rs", "src/pattern.rs", "src/pod.rs"];

/// The probe. Only some cases run it.
const PROBE: &str = "src/bin/probe";

/// The build settings of the tests. Versions of crates in Cargo.lock change nothing that a case asks for.
const BUILD: [&str; 1] = ["Cargo.toml"];

/// The sources of the tests, by their paths relative to `tests/`.
#[derive(Debug)]
pub(super) struct Sources {
    files: BTreeMap<String, String>,
}

impl Sources {
    /// Reads all sources. They must be UTF-8.
    pub(super) fn read() -> Result<Self> {
        let root = repository::root().join("tests");
        let mut files = BTreeMap::new();
        for dir in ["src", "tests"] {
            collect(&root, Path::new(dir), &mut files)?;
        }
        for file in BUILD {
            files.insert(file.to_owned(), text(&root.join(file))?);
        }
        Ok(Self { files })
    }

    /// Source of the program `name` without its cases: how it starts its engine.
    pub(super) fn program(&self, name: &str) -> Result<Vec<u8>> {
        let paths = [format!("{PROGRAMS}/{name}.rs"), format!("{PROGRAMS}/{name}/main.rs")];
        let source = paths.iter().find_map(|path| self.files.get(path));
        let source = source.with_context(|| format!("there is no {}", paths[0]))?;
        Ok(without_cases(source).into_bytes())
    }

    /// Source of the harness of all cases.
    pub(super) fn harness(&self) -> Result<Vec<u8>> {
        let below = |path: &str, dir: &str| Path::new(path).starts_with(dir);
        let chosen = self.files.iter().filter(|(path, _)| {
            BUILD.contains(&path.as_str())
                || below(path, "src")
                    && !below(path, CASES)
                    && !below(path, PROBE)
                    && !ASIDE.contains(&path.as_str())
        });
        Ok(joined(chosen))
    }

    /// Source of a case: its function, and its module without other cases.
    ///
    /// Modules that these name count too, without their other cases. The probe counts if the source
    /// has the word. Fails if no module has the case.
    pub(super) fn case(&self, case: &str) -> Result<Vec<u8>> {
        let modules: BTreeMap<&str, &str> = self
            .files
            .iter()
            .filter(|(path, _)| is_module(path))
            .map(|(path, source)| (module(path), source.as_str()))
            .collect();
        let own = modules.iter().filter(|(_, source)| split(source).1.contains_key(case));
        // If two modules have a case of this name, both count: only the table tells which one runs.
        let mut wanted: Vec<&str> = own.map(|(name, _)| *name).collect();
        if wanted.is_empty() {
            bail!("no module of tests/{CASES} or of a program has a case {case}");
        }
        let mut parts = Vec::new();
        let mut next = 0;
        while let Some(&name) = wanted.get(next) {
            next += 1;
            let (rest, functions) = split(modules[name]);
            let function = functions.get(case).copied().unwrap_or_default();
            for other in modules.keys() {
                let named = [&rest, function].iter().any(|text| {
                    text.contains(&format!("super::{other}::"))
                        || text.contains(&format!("cases::{other}::"))
                        || text.contains(&format!("crate::{other}::"))
                });
                if named && !wanted.contains(other) {
                    wanted.push(other);
                }
            }
            parts.push(format!("{name}\0{rest}\0{function}\0"));
        }
        let mut content = parts.concat().into_bytes();
        if String::from_utf8_lossy(&content).to_lowercase().contains("probe") {
            let probe = self.files.iter().filter(|(path, _)| Path::new(path).starts_with(PROBE));
            content.extend(joined(probe));
        }
        Ok(content)
    }
}

/// Reads all files below `root/dir`.
fn collect(root: &Path, dir: &Path, files: &mut BTreeMap<String, String>) -> Result<()> {
    let at = root.join(dir);
    let entries = fs::read_dir(&at).with_context(|| format!("cannot list {}", at.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", at.display()))?;
        let path: PathBuf = dir.join(entry.file_name());
        if root.join(&path).is_dir() {
            collect(root, &path, files)?;
        } else {
            files.insert(path.to_string_lossy().into_owned(), text(&root.join(&path))?);
        }
    }
    Ok(())
}

/// The text of a file. Of a Rust file without the lines that are comments: they prove nothing.
fn text(path: &Path) -> Result<String> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "rs") {
        return Ok(without_comments(&text));
    }
    Ok(text)
}

fn without_comments(source: &str) -> String {
    let lines = source.split_inclusive('\n');
    lines.filter(|line| !line.trim_start().starts_with("//")).collect()
}

/// The source of a program without the lines that only name cases and their modules. So a further
/// case leaves the proofs of the others as they are.
fn without_cases(source: &str) -> String {
    let names_cases = |line: &&str| {
        let line = line.trim_start();
        ["case!(", "mod ", "use isopod_tests::engine::cases::"]
            .iter()
            .any(|beginning| line.starts_with(beginning))
    };
    source.split_inclusive('\n').filter(|line| !names_cases(line)).collect()
}

/// Paths and contents in one piece.
fn joined<'a>(files: impl Iterator<Item = (&'a String, &'a String)>) -> Vec<u8> {
    files.map(|(path, source)| format!("{path}\0{source}\0")).collect::<String>().into_bytes()
}

/// Tells whether a file is a module that may have cases.
fn is_module(path: &str) -> bool {
    let folder = Path::new(path).parent();
    let of_a_program = folder.and_then(Path::parent) == Some(Path::new(PROGRAMS));
    let table = TABLES.iter().any(|table| path.ends_with(table));
    (folder == Some(Path::new(CASES)) || of_a_program) && !table
}

/// Name of the module in a file: `life` for `src/engine/cases/life.rs`.
fn module(path: &str) -> &str {
    Path::new(path).file_stem().and_then(|stem| stem.to_str()).unwrap_or(path)
}

/// Splits a module into its source without cases, and its cases by name.
///
/// A case is a function `pub fn NAME(run: &Run<'_>) {`, or `pub(crate)`, up to its closing brace, in
/// the format of rustfmt. All other text belongs to the module.
fn split(source: &str) -> (String, BTreeMap<&str, &str>) {
    let mut rest = String::new();
    let mut functions = BTreeMap::new();
    let mut at = 0;
    while let Some(found) = source[at..].find("\npub") {
        let begin = at + found + 1;
        let line = source[begin..].lines().next().unwrap_or_default();
        let function = FUNCTIONS.iter().find_map(|function| line.strip_prefix(function));
        let name = function.and_then(|line| line.strip_suffix("(run: &Run<'_>) {"));
        let end = source[begin..].find("\n}\n").map(|end| begin + end + 3);
        match (name, end) {
            (Some(name), Some(end)) => {
                rest.push_str(&source[at..begin]);
                functions.insert(name, &source[begin..end]);
                // The search for the next case begins at the line break.
                at = end - 1;
            }
            _ => {
                rest.push_str(&source[at..begin + line.len()]);
                at = begin + line.len();
            }
        }
    }
    rest.push_str(&source[at..]);
    (rest, functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "use x;\n\nfn help() {}\n\npub fn one(run: &Run<'_>) {\n    a();\n}\n\
                          \npub fn two(run: &Run<'_>) {\n    b();\n}\n\
                          pub fn drag(n: u8) {\n    c();\n}\n";

    fn sources(module: &str) -> Sources {
        let file = |path: &str, text: &str| (path.to_owned(), text.to_owned());
        let files = [
            file("src/engine/cases/m.rs", module),
            file("src/engine/cases/other.rs", "fn shared() {}\n"),
            file("src/bin/probe/main.rs", "fn main() {}\n"),
        ];
        Sources { files: BTreeMap::from(files) }
    }

    #[test]
    fn a_case_rests_on_its_function_and_the_module_but_on_no_other_case() {
        let (rest, functions) = split(MODULE);
        assert_eq!(functions.keys().copied().collect::<Vec<_>>(), ["one", "two"]);
        assert!(rest.contains("fn help") && rest.contains("c();"), "{rest}");
        assert!(!rest.contains("a();") && !rest.contains("b();"), "{rest}");
        let case = |module: &str| sources(module).case("one").unwrap();
        let before = case(MODULE);
        assert_eq!(before, case(&MODULE.replace("b();", "changed();")));
        for changed in ["a();", "c();", "help"] {
            assert_ne!(before, case(&MODULE.replace(changed, "changed();")), "{changed}");
        }
        assert!(sources(MODULE).case("three").is_err());
    }

    #[test]
    fn a_case_rests_on_modules_that_it_names_and_on_the_probe_if_it_runs_it() {
        let content = |body: &str| {
            let case = sources(&MODULE.replace("a();", body)).case("one").unwrap();
            String::from_utf8(case).unwrap()
        };
        assert!(!content("a();").contains("fn shared") && !content("a();").contains("fn main"));
        assert!(content("super::other::shared();").contains("fn shared"));
        assert!(content("run.probe(&[]);").contains("fn main"));
    }

    #[test]
    fn comments_prove_nothing() {
        let plain = "fn a() {\n    b();\n}\n";
        let commented = "//! x\nfn a() {\n    // Why.\n    b();\n}\n/// y\n";
        assert_eq!(without_comments(commented), plain);
        assert_eq!(without_comments(plain), plain);
    }

    #[test]
    fn a_further_case_changes_no_other_proof() {
        let program = "mod a;\n\nuse isopod_tests::engine::cases::{life, exec};\n\n\
                       const CASES: &[Case] = &[\n    case!(life::stop),\n];\n\n\
                       fn main() -> ExitCode {\n    suite(Engine::podman, CASES)\n}\n";
        let more = program
            .replace("mod a;\n", "mod a;\nmod b;\n")
            .replace("{life, exec}", "{life, exec, files}")
            .replace("stop),\n", "stop),\n    case!(b::raw).isopod_only(),\n");
        assert_ne!(program, more);
        assert_eq!(without_cases(program), without_cases(&more));
        let other = program.replace("podman", "docker");
        assert_ne!(without_cases(program), without_cases(&other));
    }

    /// Each case in a table is found in the sources.
    #[test]
    fn every_case_is_found() {
        let sources = Sources::read().unwrap();
        let mut cases = 0;
        for (path, source) in &sources.files {
            if !path.starts_with("tests/") && !path.ends_with("cases/mod.rs") {
                continue;
            }
            let rows = source.split("case!(").skip(1).filter_map(|row| row.split(')').next());
            for name in rows.filter_map(|row| row.split("::").last()) {
                let content = String::from_utf8(sources.case(name).unwrap()).unwrap();
                let found = FUNCTIONS.iter().any(|f| content.contains(&format!("\0{f}{name}(")));
                assert!(found, "{name} of {path}");
                cases += 1;
            }
        }
        assert!(cases > 50, "only {cases} cases");
    }

    /// The engine's harness uses no file of [`ASIDE`].
    #[test]
    fn engines_do_without_what_is_aside() {
        let sources = Sources::read().unwrap();
        let engine = sources.files.iter().filter(|(path, _)| path.starts_with("src/engine/"));
        for (path, source) in engine {
            for word in [
                "crate::container",
                "crate::pattern",
                "crate::pod",
                ".container()",
                "in_pod",
                "crate::{",
            ] {
                assert!(!source.contains(word), "{path} has {word}");
            }
            // page.rs includes documentation. Its cases are for Isopod only, so they have no proof.
            let includes = source.contains("include_") && path.starts_with(CASES);
            assert!(!includes || path.ends_with("page.rs"), "{path} includes a file");
        }
        let harness = String::from_utf8(sources.harness().unwrap()).unwrap();
        assert!(harness.contains("src/engine/world.sh\0") && harness.contains("Cargo.toml\0"));
    }
}
