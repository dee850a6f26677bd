//! Members of a JSON object, with their places in the text: so that one can be added or removed
//! while all other bytes stay.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// An object in a text.
#[derive(Debug)]
pub(super) struct Members<'a> {
    text: &'a str,
    /// Place behind the opening brace.
    start: usize,
    /// Name and place of each member, without the commas.
    members: Vec<(String, Range<usize>, &'a str)>,
}

impl<'a> Members<'a> {
    /// Finds the members of the object that is the whole text.
    pub(super) fn of_text(text: &'a str) -> serde_json::Result<Self> {
        Self::of(text, text)
    }

    /// Finds the members of an object that is a value in the text, as [`Self::value`] returns it.
    pub(super) fn of(text: &'a str, value: &'a str) -> serde_json::Result<Self> {
        let List(list) = serde_json::from_str(value)?;
        // The value is a part of the text.
        let base = value.as_ptr() as usize - text.as_ptr() as usize;
        let start = base + value.find('{').unwrap_or_default() + 1;
        let mut behind = start;
        let mut members = Vec::with_capacity(list.len());
        for (name, raw) in list {
            let end = raw.as_ptr() as usize - text.as_ptr() as usize + raw.len();
            // Before the name there are only blanks and a comma.
            let begin = behind + text[behind..end].find('"').unwrap_or_default();
            members.push((name, begin..end, raw));
            behind = end;
        }
        Ok(Self { text, start, members })
    }

    /// Text of the value of the only member of this name. None if there is none, or several.
    pub(super) fn value(&self, name: &str) -> Option<&'a str> {
        let mut named = self.members.iter().filter(|(other, ..)| other == name);
        let (_, _, value) = named.next()?;
        named.next().is_none().then_some(*value)
    }

    /// Tells whether there is a member of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.members.iter().any(|(other, ..)| other == name)
    }

    /// The text with one member more, before all others and laid out like the first one.
    pub(super) fn with_first(&self, member: &str) -> String {
        let (head, tail) = self.text.split_at(self.start);
        match self.members.first() {
            None => format!("{head}{member}{tail}"),
            Some((_, place, _)) => {
                let blank = &self.text[self.start..place.start];
                format!("{head}{blank}{member},{tail}")
            }
        }
    }

    /// The text without a member. What [`Self::with_first`] has added goes byte for byte.
    pub(super) fn without(&self, name: &str) -> String {
        let Some(at) = self.members.iter().position(|(other, ..)| other == name) else {
            return self.text.to_owned();
        };
        let (_, place, _) = &self.members[at];
        let gone = match (at.checked_sub(1), self.members.get(at + 1)) {
            (Some(before), _) => self.members[before].1.end..place.end,
            (None, Some((_, next, _))) => {
                let between = &self.text[place.end..next.start];
                self.start..place.end + between.find(',').map_or(0, |comma| comma + 1)
            }
            (None, None) => place.clone(),
        };
        format!("{}{}", &self.text[..gone.start], &self.text[gone.end..])
    }
}

/// Members in their order, with the texts of the values.
struct List<'a>(Vec<(String, &'a str)>);

impl<'de> Deserialize<'de> for List<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = List<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<List<'de>, A::Error> {
                let mut list = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    list.push((name, value.get()));
                }
                Ok(List(list))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_comes_and_goes_without_a_trace() {
        for text in [
            "{}",
            " { } \n",
            "{\"b\":1}",
            "{ \"b\" : {\"c\": [1, \"}\"]} , \"d\":2}\n",
            "{\n\t\"b\": \"x,{\\\"\",\n\t\"d\": null\n}",
            "{\r\n  \"\u{e9}\": 1\r\n}\r\n",
        ] {
            let members = Members::of_text(text).unwrap();
            let added = members.with_first("\"a\": {\"x\": 1}");
            let found = Members::of_text(&added).unwrap();
            assert_eq!(found.value("a"), Some("{\"x\": 1}"), "{added}");
            assert_eq!(found.members.len(), members.members.len() + 1);
            assert_eq!(found.without("a"), text);
            assert_eq!(found.without("none"), added);
        }
    }

    #[test]
    fn a_member_anywhere_can_be_removed() {
        let text = "{\n  \"a\": 1,\n  \"b\": 2,\n  \"c\": 3\n}";
        let members = Members::of_text(text).unwrap();
        assert_eq!(members.without("a"), "{\n  \"b\": 2,\n  \"c\": 3\n}");
        assert_eq!(members.without("b"), "{\n  \"a\": 1,\n  \"c\": 3\n}");
        assert_eq!(members.without("c"), "{\n  \"a\": 1,\n  \"b\": 2\n}");
    }

    #[test]
    fn an_object_within_is_found_in_the_whole_text() {
        let text = "{\"x\": 1, \"a\": { \"b\": 2 }}";
        let whole = Members::of_text(text).unwrap();
        let inner = Members::of(text, whole.value("a").unwrap()).unwrap();
        assert_eq!(inner.with_first("\"c\": 3"), "{\"x\": 1, \"a\": { \"c\": 3, \"b\": 2 }}");
        assert_eq!(inner.without("b"), "{\"x\": 1, \"a\": {  }}");
    }

    #[test]
    fn other_texts_are_errors() {
        for text in ["", "[]", "1", "{\"a\":}", "{\"a\": 1,}", "{} x"] {
            assert!(Members::of_text(text).is_err(), "{text}");
        }
        let twice = Members::of_text("{\"a\": 1, \"a\": 2}").unwrap();
        assert!(twice.has("a") && twice.value("a").is_none());
    }
}
