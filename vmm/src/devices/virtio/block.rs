//! Block device (virtio 1.2, 5.2) over a raw image or a host block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::chain::{Buffers, Chain, returned};
use super::device::{Activation, VirtioDevice, read_from};
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState};
use super::worker::{Hold, Stop, Worker, wait_for_work};
use crate::memory::GuestMemoryMap;

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];

/// Most segments of a request, apart from header and status. The queue holds them all.
const MAX_SEGMENTS: u32 = 128;

/// Longest segment in bytes.
const MAX_SEGMENT_LEN: u32 = 128 * 1024;

/// Most data of one request in bytes, so that a request does not keep the worker from its stop.
const MAX_DATA_LEN: usize = MAX_SEGMENTS as usize * MAX_SEGMENT_LEN as usize;

const SECTOR_SIZE: u64 = 512;

const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// Length of the serial number in a `GET_ID` answer.
const ID_LEN: usize = 20;

/// A disk of the guest.
pub struct Block {
    disk: Arc<Disk>,
    worker: Option<Worker<Work>>,
}

/// The disk and the queue of the worker.
struct Work {
    disk: Arc<Disk>,
    memory: GuestMemoryMap,
    queue: ActiveQueue,
}

struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_LEN],
}

impl Block {
    /// Creates a disk over `file`, whose length in whole sectors is the capacity. The guest sees the
    /// first 20 bytes of `serial`.
    ///
    /// # Errors
    ///
    /// When the length is unknown, or less than a sector.
    pub fn new(mut file: File, serial: &str, read_only: bool) -> io::Result<Self> {
        // The metadata of a block device has length 0, but a seek finds its end.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR_SIZE;
        if sectors == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "shorter than one sector"));
        }
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let disk = Arc::new(Disk { file, sectors, read_only, id });
        Ok(Self { disk, worker: None })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only { FEATURE_READ_ONLY } else { 0 };
        FEATURE_FLUSH | FEATURE_SIZE_MAX | FEATURE_SEG_MAX | read_only
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // capacity, size_max, seg_max (5.2.4).
        let mut config = [0u8; 16];
        config[..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&MAX_SEGMENT_LEN.to_le_bytes());
        config[12..].copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        read_from(&config, offset, data);
    }

    fn has_worker(&self, _index: usize) -> bool {
        true
    }

    fn activate(&mut self, active: Activation) -> io::Result<()> {
        let [queue] = <[_; 1]>::try_from(active.queues)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let work = Work { disk: Arc::clone(&self.disk), memory: active.memory, queue };
        self.worker = Some(Worker::start("block", work, active.end, Work::serve)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }

    fn server(&mut self) -> Option<&mut dyn Hold> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Hold)
    }

    fn state(&self) -> Option<DeviceState> {
        let work = self.worker.as_ref()?.held()?;
        // The disk's content is that of its file.
        Some(DeviceState { queues: vec![work.queue.state()], own: OwnState::default() })
    }
}

impl Work {
    fn serve(&mut self, stop: &Stop) {
        let Self { disk, memory, queue } = self;
        loop {
            queue.disable_kicks(memory);
            while !stop.is_given()
                && let Some(chain) = queue.pop(memory)
            {
                let head = chain.head;
                let written = disk.execute(chain);
                queue.push(memory, head, written);
                queue.signal(memory);
            }
            if stop.is_given()
                || (!queue.enable_kicks(memory) && !wait_for_work(stop, &[queue.kick()]))
            {
                return;
            }
        }
    }
}

/// A request, parsed and checked whole before any part of it is executed.
enum BlockRequest<'m> {
    Read { offset: u64, into: Buffers<'m> },
    Write { offset: u64, from: Buffers<'m> },
    Flush,
    GetId { into: Buffers<'m> },
}

impl Disk {
    /// Executes one request. Returns the number of bytes written to the chain.
    fn execute(&self, chain: Chain<'_>) -> u32 {
        let Chain { mut readable, mut writable, .. } = chain;
        // The status is the last writable byte (5.2.6). Without room for it there is no answer.
        let Some(data_len) = writable.len().checked_sub(1) else { return 0 };
        let Some(data) = writable.split_to(data_len) else { return 0 };
        let mut status = writable;
        let (code, written) = match self.parse(&mut readable, data) {
            Ok(request) => match self.perform(request) {
                Ok(written) => (STATUS_OK, written),
                Err(_) => (STATUS_IO_ERROR, 0),
            },
            Err(code) => (code, 0),
        };
        status.put(&[code]).map_or(0, |()| written as u32 + 1)
    }

    fn parse<'m>(
        &self,
        readable: &mut Buffers<'m>,
        writable: Buffers<'m>,
    ) -> Result<BlockRequest<'m>, u8> {
        let kind = u32::from_le_bytes(readable.take::<4>().ok_or(STATUS_IO_ERROR)?);
        readable.take::<4>().ok_or(STATUS_IO_ERROR)?; // reserved
        let sector = u64::from_le_bytes(readable.take::<8>().ok_or(STATUS_IO_ERROR)?);
        match kind {
            TYPE_IN => {
                let offset = self.check_range(sector, writable.len())?;
                Ok(BlockRequest::Read { offset, into: writable })
            }
            TYPE_OUT if self.read_only => Err(STATUS_IO_ERROR),
            TYPE_OUT => {
                let offset = self.check_range(sector, readable.len())?;
                Ok(BlockRequest::Write { offset, from: std::mem::take(readable) })
            }
            TYPE_FLUSH => Ok(BlockRequest::Flush),
            TYPE_GET_ID if writable.len() >= ID_LEN => Ok(BlockRequest::GetId { into: writable }),
            TYPE_GET_ID => Err(STATUS_IO_ERROR),
            _ => Err(STATUS_UNSUPPORTED),
        }
    }

    /// Returns the byte offset of `sector`. The `len` bytes from there must be whole sectors of
    /// this disk, and no more than a request may have.
    fn check_range(&self, sector: u64, len: usize) -> Result<u64, u8> {
        if len > MAX_DATA_LEN {
            return Err(STATUS_IO_ERROR);
        }
        let len = len as u64;
        let end = sector.checked_add(len / SECTOR_SIZE).ok_or(STATUS_IO_ERROR)?;
        if !len.is_multiple_of(SECTOR_SIZE) || end > self.sectors {
            return Err(STATUS_IO_ERROR);
        }
        Ok(sector * SECTOR_SIZE)
    }

    fn perform(&self, request: BlockRequest<'_>) -> io::Result<usize> {
        match request {
            BlockRequest::Read { offset, into } => self.transfer(into, offset, libc::preadv64),
            BlockRequest::Write { offset, from } => {
                self.transfer(from, offset, libc::pwritev64).map(|_| 0)
            }
            BlockRequest::Flush => self.file.sync_data().map(|()| 0),
            BlockRequest::GetId { mut into } => {
                into.put(&self.id);
                Ok(ID_LEN)
            }
        }
    }

    fn transfer(
        &self,
        mut buffers: Buffers<'_>,
        offset: u64,
        call: unsafe extern "C" fn(i32, *const libc::iovec, i32, i64) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let mut done = 0;
        while !buffers.is_empty() {
            let iovecs = buffers.iovecs(usize::MAX);
            let at = (offset + done as u64) as i64;
            // SAFETY: each iovec is a checked piece of guest memory, which stays mapped while the
            // chain borrows it. The guest may race with the call, which can only spoil the guest's
            // own data.
            let result =
                unsafe { call(self.file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at) };
            match returned(result) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    done += len;
                    buffers.split_to(len);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }
}
