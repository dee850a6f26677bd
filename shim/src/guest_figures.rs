//! Figures of the guest's kernel about a container: the interface files of its cgroup, and
//! /proc/net/dev. They come from the guest. A figure that cannot be read is 0: at worst a figure is
//! wrong.

use std::collections::{BTreeMap, HashMap};

use isopod_protocol::agent::ContainerStats;

/// Largest number of lines, interfaces or devices that are read.
pub(crate) const MAX_SHOWN: usize = 1024;

/// A limit that does not limit.
pub(crate) const UNLIMITED: u64 = u64::MAX;

/// Interface files by their names.
pub(crate) struct Files<'a>(&'a HashMap<String, String>);

impl<'a> Files<'a> {
    /// The files that the agent has read.
    pub(crate) fn of(read: &'a ContainerStats) -> Self {
        Self(&read.cgroup_files)
    }

    /// Names of the files.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a String> + use<'a> {
        self.0.keys()
    }

    /// Content of a file, empty if there is no such file.
    pub(crate) fn text(&self, name: &str) -> &'a str {
        self.0.get(name).map_or("", |text| text.trim())
    }

    /// A number, or [`UNLIMITED`] for `max`.
    pub(crate) fn number(&self, name: &str) -> u64 {
        match self.text(name) {
            "max" => UNLIMITED,
            text => text.parse().unwrap_or(0),
        }
    }

    /// The lines `key number` of a file.
    pub(crate) fn fields(&self, name: &str) -> BTreeMap<&'a str, u64> {
        let field = |line: &'a str| {
            let (key, number) = line.split_once(' ')?;
            Some((key, number.trim().parse().ok()?))
        };
        self.text(name).lines().take(MAX_SHOWN).filter_map(field).collect()
    }
}

/// Use of a block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u64,
    pub(crate) minor: u64,
    /// Bytes read and written.
    pub(crate) rbytes: u64,
    pub(crate) wbytes: u64,
    /// Reads and writes.
    pub(crate) rios: u64,
    pub(crate) wios: u64,
}

/// The lines of `io.stat`, such as `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`. Lines
/// without a figure are left out.
pub(crate) fn devices(text: &str) -> Vec<Device> {
    let device = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
        let mut device = Device { major, minor, ..Device::default() };
        let mut known = false;
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let figure = match key {
                "rbytes" => &mut device.rbytes,
                "wbytes" => &mut device.wbytes,
                "rios" => &mut device.rios,
                "wios" => &mut device.wios,
                _ => continue,
            };
            *figure = value.parse().unwrap_or(0);
            known = true;
        }
        known.then_some(device)
    };
    text.lines().take(MAX_SHOWN).filter_map(device).collect()
}

/// Use of a network interface. Each direction has bytes, packets, errors and dropped packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) received: [u64; 4],
    pub(crate) sent: [u64; 4],
}

/// The interfaces in /proc/net/dev without loopback. A line has a name, eight figures about
/// received data, and eight about sent data.
pub(crate) fn interfaces(text: &str) -> Vec<Interface> {
    let interface = |line: &str| {
        let (name, figures) = line.trim().split_once(':')?;
        let figures: Vec<u64> =
            figures.split_ascii_whitespace().map_while(|n| n.parse().ok()).collect();
        let (received, sent) = figures.split_at_checked(8)?;
        let (received, sent) = (*received.first_chunk()?, *sent.first_chunk()?);
        (name != "lo").then(|| Interface { name: name.to_owned(), received, sent })
    };
    text.lines().filter_map(interface).take(MAX_SHOWN).collect()
}
