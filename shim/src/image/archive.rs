//! A tar archive, read as a stream: ustar, GNU and PAX (POSIX.1-2001, pax). It is read as Go's
//! archive/tar reads it, and so as engines do.
//!
//! Descriptions of an entry are held in memory, and bounded. Contents are handed on.

use std::io::{self, ErrorKind, Read};

use rustix::fs::Timespec;
use tar_core::{EntryType, HEADER_SIZE, Header};

use crate::text::quoted;

/// Largest extended header or long name of an entry, in bytes. Go has the same limit.
const MAX_EXTENSION: u64 = 1 << 20;

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    Fifo,
    /// Major and minor number.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
}

/// An entry, with the descriptions that precede it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    /// Target of a link. Empty for all other entries.
    pub(super) link: Vec<u8>,
    /// Permissions with set-id and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timespec,
    /// Names and values.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar archive. Reads give the content of the current entry.
#[derive(Debug)]
pub(super) struct Archive<R> {
    source: R,
    /// Bytes left of the current entry's content.
    content: u64,
    /// Bytes between that content and the next header.
    padding: u64,
}

/// Descriptions that precede their entry.
#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Option<Vec<u8>>,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, content: 0, padding: 0 }
    }

    /// Goes to the next entry. None at the end of the archive.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut before = Extensions::default();
        loop {
            let Some(header) = self.next_header()? else {
                if before.path.is_some() || before.link.is_some() || before.pax.is_some() {
                    return Err(invalid("it ends where an entry should follow"));
                }
                return Ok(None);
            };
            let slot = match header.entry_type() {
                EntryType::GnuLongName => &mut before.path,
                EntryType::GnuLongLink => &mut before.link,
                EntryType::XHeader => &mut before.pax,
                // Engines skip a header that describes all entries to come.
                EntryType::XGlobalHeader => {
                    self.set_content(size_of(&header)?)?;
                    continue;
                }
                _ => return self.entry(&header, before).map(Some),
            };
            if slot.is_some() {
                return Err(invalid("an entry is described twice"));
            }
            self.set_content(size_of(&header)?)?;
            if self.content > MAX_EXTENSION {
                return Err(invalid("the description of an entry is larger than 1 MiB"));
            }
            let mut bytes = Vec::new();
            self.read_to_end(&mut bytes)?;
            if header.entry_type() != EntryType::XHeader {
                bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
            }
            *slot = Some(bytes);
        }
    }

    fn entry(&mut self, header: &Header, before: Extensions) -> io::Result<Entry> {
        let pax = Pax::parse(before.pax.as_deref().unwrap_or_default())?;
        let path = pax.path.or(before.path).unwrap_or_else(|| path_of(header));
        let named = |problem: &str| invalid(&format!("{problem} (entry {})", quoted(&path)));
        if pax.sparse || header.entry_type() == EntryType::GnuSparse {
            return Err(named(
                "it has a sparse file, which is not supported: pack it without holes",
            ));
        }
        let kind = kind_of(header, &path).map_err(|problem| named(&problem))?;
        // All other entries have no content, whatever their size says.
        let size =
            if kind == Kind::File { pax.size.map_or_else(|| size_of(header), Ok)? } else { 0 };
        self.set_content(size)?;
        let id = |id: u64| {
            let id = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
            id.ok_or_else(|| named("an owner's number is out of range"))
        };
        let header_link = || header.link_name_bytes().to_vec();
        // A negative number is a two's complement.
        #[allow(clippy::cast_possible_wrap, reason = "as GNU tar writes times before 1970")]
        let seconds = header.mtime().map_err(malformed)? as i64;
        Ok(Entry {
            kind,
            link: pax.link.or(before.link).unwrap_or_else(header_link),
            mode: header.mode().map_err(malformed)? & 0o7777,
            uid: id(pax.uid.map_or_else(|| header.uid().map_err(malformed), Ok)?)?,
            gid: id(pax.gid.map_or_else(|| header.gid().map_err(malformed), Ok)?)?,
            mtime: pax.mtime.unwrap_or(Timespec { tv_sec: seconds, tv_nsec: 0 }),
            xattrs: pax.xattrs,
            path,
        })
    }

    /// Skips the rest of the current entry and reads a header. None at the end: two zero blocks, or
    /// no more blocks, as with Go.
    fn next_header(&mut self) -> io::Result<Option<Header>> {
        io::copy(self, &mut io::sink())?;
        let mut left = (&mut self.source).take(self.padding);
        if io::copy(&mut left, &mut io::sink())? < self.padding {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.padding = 0;
        let Some(block) = self.block()? else { return Ok(None) };
        if block == [0; HEADER_SIZE] {
            return match self.block()? {
                Some(block) if block != [0; HEADER_SIZE] => Err(invalid("it has an empty header")),
                _ => Ok(None),
            };
        }
        let header = *Header::from_bytes(&block);
        header.verify_checksum().map_err(malformed)?;
        Ok(Some(header))
    }

    fn block(&mut self) -> io::Result<Option<[u8; HEADER_SIZE]>> {
        let mut block = [0; HEADER_SIZE];
        let mut filled = 0;
        while filled < HEADER_SIZE {
            match self.source.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        Ok(Some(block))
    }

    fn set_content(&mut self, size: u64) -> io::Result<()> {
        // No file can be larger, and below this size no sum of sizes overflows.
        if size > i64::MAX as u64 {
            return Err(invalid("an entry's size is out of range"));
        }
        self.content = size;
        self.padding = size.next_multiple_of(HEADER_SIZE as u64) - size;
        Ok(())
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        match self.source.read(&mut buffer[..most])? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            n => {
                self.content -= n as u64;
                Ok(n)
            }
        }
    }
}

fn kind_of(header: &Header, path: &[u8]) -> Result<Kind, String> {
    let number = |number: tar_core::Result<Option<u32>>| {
        number.map(Option::unwrap_or_default).map_err(|e| e.to_string())
    };
    let device =
        || Ok::<_, String>((number(header.device_major())?, number(header.device_minor())?));
    Ok(match header.entry_type() {
        // In archives from before there were types, a slash at the end makes a directory.
        EntryType::Regular if header.as_old().linkflag == [0] && path.ends_with(b"/") => {
            Kind::Directory
        }
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
        EntryType::Block => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
        other => {
            let byte = other.to_byte();
            return Err(format!("entries of the type {} are not supported", quoted(&[byte])));
        }
    })
}

fn path_of(header: &Header) -> Vec<u8> {
    let name = header.path_bytes();
    match header.prefix() {
        Some(prefix) if !prefix.is_empty() => [prefix, name].join(&b'/'),
        _ => name.to_vec(),
    }
}

fn size_of(header: &Header) -> io::Result<u64> {
    header.entry_size().map_err(malformed)
}

/// Records of a PAX header that have an effect here.
#[derive(Debug, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Timespec>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: bool,
}

impl Pax {
    fn parse(mut records: &[u8]) -> io::Result<Self> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (key, value, rest) =
                record(records).ok_or_else(|| invalid("a PAX record is malformed"))?;
            records = rest;
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                // The last record of a name holds.
                pax.xattrs.retain(|(other, _)| other != name);
                pax.xattrs.push((name.to_vec(), value.to_vec()));
                continue;
            }
            if key.starts_with(b"GNU.sparse.") {
                pax.sparse = true;
                continue;
            }
            // An empty value takes back a global record, and these are skipped anyway.
            if value.is_empty() {
                continue;
            }
            let malformed = || {
                let (key, value) = (quoted(key), quoted(value));
                invalid(&format!("the PAX record {key} has the value {value}"))
            };
            let number = || {
                let text = std::str::from_utf8(value).ok();
                text.and_then(|text| text.parse().ok()).ok_or_else(malformed)
            };
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"linkpath" => pax.link = Some(value.to_vec()),
                b"size" => pax.size = Some(number()?),
                b"uid" => pax.uid = Some(number()?),
                b"gid" => pax.gid = Some(number()?),
                b"mtime" => pax.mtime = Some(time(value).ok_or_else(malformed)?),
                _ => {}
            }
        }
        Ok(pax)
    }
}

/// Key and value of the first of `records` ("LENGTH KEY=VALUE\n"), and the records behind it.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    let text = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&text[..equals], &text[equals + 1..]);
    (!key.is_empty()).then_some((key, value, rest))
}

/// Parses seconds since 1970 with a fraction, to the nanosecond.
fn time(value: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut time = Timespec { tv_sec: seconds.parse().ok()?, tv_nsec: 0 };
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = fraction.get(..9).unwrap_or(fraction);
    let nanoseconds: i64 = format!("{digits:0<9}").parse().ok()?;
    time.tv_nsec = nanoseconds;
    if text.starts_with('-') && nanoseconds > 0 {
        time.tv_sec = time.tv_sec.checked_sub(1)?;
        time.tv_nsec = 1_000_000_000 - nanoseconds;
    }
    Some(time)
}

fn malformed(error: impl std::fmt::Display) -> io::Error {
    invalid(&error.to_string())
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_nanoseconds_and_may_lie_before_1970() {
        for (text, expected) in [
            ("0", Some((0, 0))),
            ("1700000000.5", Some((1_700_000_000, 500_000_000))),
            ("1.123456789987", Some((1, 123_456_789))),
            ("1.", Some((1, 0))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("", None),
            ("1.x", None),
            ("1.-5", None),
            ("99999999999999999999", None),
            ("-9223372036854775808.5", None),
        ] {
            let found = time(text.as_bytes()).map(|time| (time.tv_sec, time.tv_nsec));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn records_may_hold_any_byte_and_lie_about_nothing() {
        let pax = Pax::parse(b"23 SCHILY.xattr.a=\n=\0\n\n\n11 path=a/\n").unwrap_err();
        assert!(pax.to_string().contains("malformed"));
        let pax = Pax::parse(b"24 SCHILY.xattr.a=\n=\0\n\n\n11 path=a/\n").unwrap();
        assert_eq!(pax.xattrs, [(b"a".to_vec(), b"\n=\0\n\n".to_vec())]);
        assert_eq!(pax.path.unwrap(), b"a/");
        for records in [
            &b"0 a=b\n"[..],
            b"6 a=b",
            b"7 a=b\n",
            b"99999999999999999999 a=b\n",
            b"-6 a=b\n",
            b"6 a=b\n ",
            b"5 =b\n",
            b"5 ab\n",
            b"1 a=b\n",
            b"10 size=-1\n",
            b"\n",
        ] {
            assert!(Pax::parse(records).is_err(), "{}", quoted(records));
        }
    }
}
