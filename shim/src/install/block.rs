//! Lines that `install` adds at the end of a TOML file, between two marks.
//!
//! A table header is absolute, so its place does not matter. All else stays byte for byte, and
//! removing the lines restores the file.

use toml::{Table, Value};

/// The lines with their marks. The first byte ends the file's last line, or makes an empty line.
fn marked(handler: &str, lines: &str) -> String {
    let (begin, end) = marks(handler);
    format!("\n{begin}\n{lines}{end}\n")
}

fn marks(handler: &str) -> (String, String) {
    (
        format!("# BEGIN isopod install {handler}: changes here are lost, uninstall removes this"),
        format!("# END isopod install {handler}"),
    )
}

/// Adds lines to a text that has none of `install`.
pub(super) fn add(text: &str, handler: &str, lines: &str) -> String {
    format!("{text}{}", marked(handler, lines))
}

/// The text without the lines that `install` has added. The same text if there are none.
pub(super) fn remove(text: &str, handler: &str) -> String {
    let (begin, end) = marks(handler);
    let (begin, end) = (format!("\n{begin}\n"), format!("\n{end}\n"));
    let Some(from) = text.find(&begin) else { return text.to_owned() };
    // The last byte of the first mark may be the first one of the second.
    let inside = from + begin.len() - 1;
    let Some(length) = text[inside..].find(&end) else { return text.to_owned() };
    format!("{}{}", &text[..from], &text[inside + length + end.len()..])
}

/// The value at a path of keys.
pub(super) fn at<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, tables) = path.split_last()?;
    tables.iter().try_fold(table, |table, key| table.get(*key)?.as_table())?.get(*last)
}

/// Adds a table at a path of keys. False if a key on the way has another type.
pub(super) fn insert(table: &mut Table, path: &[&str], value: Table) -> bool {
    let Some((last, tables)) = path.split_last() else { return false };
    let mut table = table;
    for key in tables {
        let next = table.entry(*key).or_insert_with(|| Value::Table(Table::new()));
        let Some(next) = next.as_table_mut() else { return false };
        table = next;
    }
    table.insert((*last).to_owned(), Value::Table(value)).is_none()
}

/// Tells whether a table has all keys of `wanted`, with the same values.
pub(super) fn has_all(table: &Value, wanted: &Table) -> bool {
    let Some(table) = table.as_table() else { return false };
    wanted.iter().all(|(key, value)| table.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_restores_every_byte() {
        for text in ["", "a = 1", "a = 1\n", "# x\r\n\r\n[a]\r\n", "\n\n"] {
            let added = add(text, "isopod", "[b]\nc = 1\n");
            assert_eq!(remove(&added, "isopod"), text, "{added:?}");
            assert_eq!(remove(&added, "other"), added);
            let more = format!("{added}[later]\n");
            assert_eq!(remove(&more, "isopod"), format!("{text}[later]\n"));
            let both = add(&added, "other", "[d]\n");
            assert_eq!(remove(&both, "isopod"), add(text, "other", "[d]\n"));
        }
        let empty = add("a = 1\n", "isopod", "");
        assert_eq!(remove(&empty, "isopod"), "a = 1\n");
        let open =
            "\n# BEGIN isopod install isopod: changes here are lost, uninstall removes this\n";
        assert_eq!(remove(open, "isopod"), open);
    }

    #[test]
    fn values_are_found_and_added_by_their_path() {
        let mut table: Table = toml::from_str("[a.'b.c']\nd = 1\n").unwrap();
        assert_eq!(at(&table, &["a", "b.c", "d"]), Some(&Value::Integer(1)));
        assert_eq!(at(&table, &["a", "x", "d"]), None);
        assert_eq!(at(&table, &["a", "b.c", "d", "e"]), None);
        assert!(!insert(&mut table, &["a", "b.c", "d", "e"], Table::new()));
        assert!(insert(&mut table, &["a", "e", "f"], Table::new()));
        assert!(!insert(&mut table, &["a", "e", "f"], Table::new()));
        let wanted: Table = toml::from_str("d = 1").unwrap();
        assert!(has_all(at(&table, &["a", "b.c"]).unwrap(), &wanted));
        assert!(!has_all(at(&table, &["a", "e"]).unwrap(), &wanted));
    }
}
