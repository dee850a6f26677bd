//! Every field that a document of a type can have. serde fills in a document: the type names its
//! fields, and gets a value for each.

use std::collections::BTreeMap;

use serde::{
    Deserialize,
    de::{
        DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess, SeqAccess, VariantAccess,
        Visitor,
        value::{Error, StrDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::{Map, Value};

/// All fields of `T` by their path, such as `mounts[].type` or `linux.sysctl.*`. Each has a value
/// that asks for something and that `T` takes.
pub(in crate::bundle) fn of<'de, T: Deserialize<'de>>() -> BTreeMap<String, Value> {
    let mut fields = BTreeMap::new();
    let mut value = Value::Null;
    let root = Filler { path: String::new(), fields: &mut fields, value: &mut value };
    T::deserialize(root).unwrap_or_else(|e| panic!("a value that {e}"));
    fields
}

/// A deserializer that gives one value and records it.
struct Filler<'a> {
    path: String,
    fields: &'a mut BTreeMap<String, Value>,
    value: &'a mut Value,
}

impl Filler<'_> {
    fn text(&self) -> &'static str {
        match self.path.as_str() {
            "ociVersion" => "1.2.0",
            path if path.starts_with("process.capabilities.") => "CAP_KILL",
            path if path.starts_with("process.execCPUAffinity.") => "0",
            _ => "/x",
        }
    }
}

impl<'de> Deserializer<'de> for Filler<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let text = self.text();
        *self.value = text.into();
        visitor.visit_str(text)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        *self.value = true.into();
        visitor.visit_bool(true)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        *self.value = 7.into();
        visitor.visit_u64(7)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut item = Value::Null;
        let path = format!("{}[]", self.path);
        let items = One(Some(Filler { path, fields: self.fields, value: &mut item }));
        let result = visitor.visit_seq(items);
        *self.value = vec![item].into();
        result
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.object(&["*"], visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.object(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let variant = variants.first().ok_or_else(|| Error::custom("an enum has"))?;
        *self.value = (*variant).into();
        visitor.visit_enum(Variant(variant))
    }

    forward_to_deserialize_any! {
        char str string bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_i64(visitor)
    }
}

impl<'a> Filler<'a> {
    fn object<'de, V: Visitor<'de>>(
        self,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Self { path, fields, value } = self;
        let mut object = Map::new();
        let entries = Entries { path, fields, keys: keys.iter(), key: "", object: &mut object };
        let result = visitor.visit_map(entries);
        *value = object.into();
        result
    }
}

struct One<'a>(Option<Filler<'a>>);

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.0.take().map(|filler| seed.deserialize(filler)).transpose()
    }
}

struct Entries<'a> {
    path: String,
    fields: &'a mut BTreeMap<String, Value>,
    keys: std::slice::Iter<'static, &'static str>,
    key: &'static str,
    object: &'a mut Map<String, Value>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some(key) = self.keys.next() else { return Ok(None) };
        self.key = key;
        seed.deserialize(StrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let dot = if self.path.is_empty() { "" } else { "." };
        let path = format!("{}{dot}{}", self.path, self.key);
        let mut value = Value::Null;
        let filler = Filler { path: path.clone(), fields: self.fields, value: &mut value };
        let result = seed.deserialize(filler);
        self.object.insert(self.key.to_owned(), value.clone());
        self.fields.insert(path, value);
        result
    }
}

struct Variant(&'static str);

impl<'de> EnumAccess<'de> for Variant {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self), Error> {
        Ok((seed.deserialize(StrDeserializer::new(self.0))?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Error> {
        Err(Error::custom("an enum has no content"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("an enum has no content"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        Err(Error::custom("an enum has no content"))
    }
}

mod tests {
    use super::*;
    use oci_spec::runtime::Spec;
    use serde_json::json;

    #[test]
    fn every_depth_is_reached_with_values_that_the_types_take() {
        let fields = of::<Spec>();
        for (path, value) in [
            ("ociVersion", json!("1.2.0")),
            ("process.rlimits[].type", json!("RLIMIT_CPU")),
            ("linux.seccomp.syscalls[].args[].valueTwo", json!(7)),
            ("linux.timeOffsets.*", json!({"secs": 7, "nanosecs": 7})),
            ("linux.resources.unified.*", json!("/x")),
        ] {
            assert_eq!(fields[path], value, "{path}");
        }
        let whole: Value = fields
            .iter()
            .filter(|(path, _)| !path.contains('.') && !path.contains('['))
            .map(|(path, value)| (path.clone(), value.clone()))
            .collect::<Map<_, _>>()
            .into();
        let spec: Spec = serde_json::from_value(whole.clone()).unwrap();
        assert_eq!(serde_json::to_value(spec).unwrap(), whole);
    }
}
