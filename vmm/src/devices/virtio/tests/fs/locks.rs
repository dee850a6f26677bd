//! Tests of locks of two guests and of the host's own processes on one file.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::*;

const FLUSH: u32 = 25;
const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const INTERRUPT: u32 = 36;

const FLOCK: u32 = 1;
const TO_THE_END: u64 = i64::MAX as u64;

/// Addresses of requests with a later answer, apart from other requests.
const LATER_REQUEST: u64 = 0xc0_0000;
const LATER_ANSWER: u64 = 0xd0_0000;

/// A `fuse_lk_in`: handle, owner, kind and range of a lock.
#[derive(Clone, Copy)]
pub(super) struct Lock {
    node: u64,
    handle: u64,
    owner: u64,
    kind: i32,
    range: (u64, u64),
    flags: u32,
}

impl Lock {
    /// A write lock of process 1 on the whole file.
    pub(super) fn whole(node: u64, handle: u64, flags: u32) -> Self {
        Self { node, handle, owner: 1, kind: libc::F_WRLCK, range: (0, TO_THE_END), flags }
    }

    fn body(&self) -> Vec<u8> {
        let words = [self.handle, self.owner, self.range.0, self.range.1];
        let mut body = words.map(u64::to_le_bytes).concat();
        body.extend([self.kind as u32, 0, self.flags, 0].map(u32::to_le_bytes).concat());
        body
    }

    fn kind(self, kind: i32) -> Self {
        Self { kind, ..self }
    }

    pub(super) fn owner(self, owner: u64) -> Self {
        Self { owner, ..self }
    }
}

impl FsGuest {
    /// Returns a write lock on the whole file, through a new handle.
    fn lock(&mut self, flags: u32) -> Lock {
        let node = self.lookup(ROOT, "file").unwrap();
        let handle = self.open(OPEN, node, libc::O_RDWR).unwrap();
        Lock::whole(node, handle, flags)
    }

    pub(super) fn set_lock(&mut self, lock: Lock) -> i32 {
        self.ask(SETLK, lock.node, &lock.body()).0
    }

    /// Requests a lock without waiting for the answer. `unique` is the request's number.
    fn wait_for_lock(&mut self, lock: Lock, unique: u64) -> u16 {
        let body = lock.body();
        let mut request = header(SETLKW, lock.node, body.len());
        request[8..16].copy_from_slice(&unique.to_le_bytes());
        request.extend(body);
        let (from, to) = (LATER_REQUEST + 256 * unique, LATER_ANSWER + 256 * unique);
        self.driver.put(from, &request);
        // The answer's header in two pieces.
        let chain = [(from, request.len() as u32, false), (to, 7, true), (to + 7, 9, true)];
        self.driver.offer(REQUESTS, &chain)
    }

    /// Returns the number and the error of the request that is answered next.
    fn answer_of(&mut self, heads: &[(u16, u64)]) -> (u64, i32) {
        let (head, len) = self.driver.wait_used(REQUESTS);
        assert_eq!(len, 16);
        let (_, unique) = *heads.iter().find(|(of, _)| *of == head).unwrap();
        let answer = self.driver.get(LATER_ANSWER + 256 * unique, 16);
        assert_eq!(answer[8..16], unique.to_le_bytes());
        (unique, -i32::from_le_bytes(answer[4..8].try_into().unwrap()))
    }

    fn interrupt(&mut self, unique: u64) {
        let request = [header(INTERRUPT, 0, 8), unique.to_le_bytes().to_vec()].concat();
        self.driver.put(REQUEST, &request);
        let chain = [(REQUEST, request.len() as u32, false)];
        assert_eq!(self.driver.request(HIGH_PRIORITY, &chain), 0);
    }

    pub(super) fn flush(&mut self, lock: Lock) -> i32 {
        let words = [lock.handle, 0, lock.owner].map(u64::to_le_bytes).concat();
        self.ask(FLUSH, lock.node, &words).0
    }
}

/// Two guests that share a directory.
fn two() -> (FsGuest, FsGuest) {
    let one = FsGuest::new();
    let other = FsGuest { driver: one_more(&one), directory: Arc::clone(&one.directory) };
    (one, other.initialised())
}

fn one_more(guest: &FsGuest) -> Driver {
    let device = Fs::new(&config()).unwrap();
    device.share().open_for(guest.path("").to_str().unwrap(), None, 100).unwrap();
    Driver::started(Box::new(device))
}

/// Returns true if a process of the host gets an exclusive flock(2) lock on the file.
fn host_gets(guest: &FsGuest) -> bool {
    let file = File::open(guest.path("file")).unwrap();
    // SAFETY: the call takes numbers only.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

#[test]
fn a_lock_of_one_guest_holds_for_another_and_for_the_host() {
    for flags in [0, FLOCK] {
        let (mut one, mut other) = two();
        let (mine, theirs) = (one.lock(flags), other.lock(flags));
        assert_eq!(one.set_lock(mine), 0);
        assert_eq!(one.set_lock(mine), 0, "once more");
        assert_eq!(other.set_lock(theirs), libc::EAGAIN);
        assert_eq!(other.set_lock(theirs.kind(libc::F_RDLCK)), libc::EAGAIN);
        assert_eq!(one.set_lock(mine.owner(2)), libc::EAGAIN, "another process of the same guest");
        assert_eq!(host_gets(&one), flags == 0);
        assert_eq!(one.set_lock(mine.kind(libc::F_RDLCK)), 0);
        assert_eq!(other.set_lock(theirs.kind(libc::F_RDLCK)), 0);
        assert_eq!(one.set_lock(mine), libc::EAGAIN);
        assert_eq!(other.set_lock(theirs.kind(libc::F_UNLCK)), 0);
        assert_eq!(one.set_lock(mine), 0);
        assert_eq!(one.set_lock(mine.kind(libc::F_UNLCK)), 0);
        assert!(host_gets(&one));
        assert_eq!(other.set_lock(theirs), 0);
    }
}

#[test]
fn ranges_are_apart_and_the_one_in_the_way_is_named() {
    let (mut one, mut other) = two();
    let low = Lock { range: (10, 19), ..one.lock(0) };
    let high = Lock { range: (20, TO_THE_END), ..other.lock(0) };
    assert_eq!(one.set_lock(low), 0);
    assert_eq!(other.set_lock(high), 0);
    let all = Lock { range: (0, TO_THE_END), ..low };
    assert_eq!(one.set_lock(all), libc::EAGAIN);
    let (error, found) = one.ask(GETLK, low.node, &all.body());
    assert_eq!(error, 0);
    let word = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(8), word(16)), (20, TO_THE_END, libc::F_WRLCK as u64), "pid 0");
    let (_, free) = one.ask(GETLK, low.node, &low.body());
    assert_eq!(free[16..20], (libc::F_UNLCK as u32).to_le_bytes());
    for range in [(5, 4), (1 << 63, u64::MAX)] {
        assert_eq!(one.set_lock(Lock { range, ..low }), libc::EINVAL);
    }
    assert_eq!(one.set_lock(low.kind(7)), libc::EINVAL);
    assert_eq!(one.set_lock(Lock { handle: 999, ..low }), libc::EBADF);
    let dir = one.open(OPENDIR, ROOT, 0).unwrap();
    assert_eq!(one.set_lock(Lock { node: ROOT, handle: dir, ..low }), libc::EBADF);
}

#[test]
fn locks_go_with_a_close_a_release_and_a_reset() {
    let (mut one, mut other) = two();
    let (mine, theirs) = (one.lock(0), other.lock(0));
    // The close of one descriptor of the process releases its locks, and no others.
    assert_eq!(one.set_lock(mine), 0);
    assert_eq!(one.flush(mine.owner(2)), 0);
    assert_eq!(other.set_lock(theirs), libc::EAGAIN);
    assert_eq!(one.flush(mine), 0);
    assert_eq!(other.set_lock(theirs), 0);
    assert_eq!(other.set_lock(theirs.kind(libc::F_UNLCK)), 0);
    for flags in [0, FLOCK] {
        let mine = one.lock(flags);
        assert_eq!(one.set_lock(mine), 0);
        assert_eq!(one.flush(mine.owner(2)), 0);
        assert_eq!(other.set_lock(Lock { flags, ..theirs }), libc::EAGAIN);
        assert_eq!(one.close(RELEASE, mine.node, mine.handle), 0);
        assert_eq!(other.set_lock(Lock { flags, ..theirs }), 0);
        assert_eq!(other.set_lock(Lock { flags, ..theirs }.kind(libc::F_UNLCK)), 0);
    }
    let mine = one.lock(FLOCK);
    assert_eq!(one.set_lock(mine), 0);
    one.driver.reset();
    one.driver.start();
    one.still_serves();
    assert_eq!(other.set_lock(Lock { flags: FLOCK, ..theirs }), 0);
}

#[test]
fn who_waits_gets_the_lock_and_holds_up_nobody() {
    for flags in [0, FLOCK] {
        let (mut one, mut other) = two();
        let (mine, theirs) = (one.lock(flags), other.lock(flags).kind(libc::F_RDLCK));
        assert_eq!(one.set_lock(mine), 0);
        // More waits than workers.
        let heads: Vec<_> = (1..=10)
            .map(|unique| (other.wait_for_lock(theirs.owner(unique), unique), unique))
            .collect();
        other.still_serves();
        assert_eq!(one.set_lock(mine.kind(libc::F_UNLCK)), 0);
        let mut served: Vec<_> = heads.iter().map(|_| other.answer_of(&heads)).collect();
        served.sort_unstable();
        assert_eq!(served, (1..=10).map(|unique| (unique, 0)).collect::<Vec<_>>());
        for unique in 1..=10 {
            assert_eq!(one.set_lock(mine), libc::EAGAIN, "{unique}");
            assert_eq!(other.set_lock(theirs.owner(unique).kind(libc::F_UNLCK)), 0);
        }
        assert_eq!(one.set_lock(mine), 0);
    }
}

/// Other threads of a waiting process close the file, release everything, or lock another part.
#[test]
fn who_waits_gets_the_lock_whatever_the_process_does_meanwhile() {
    let other_part = |lock: Lock| Lock { range: (5, 5), ..lock };
    type Meanwhile = fn(&mut FsGuest, Lock) -> i32;
    let unlock: Meanwhile = |guest, lock| guest.set_lock(lock.kind(libc::F_UNLCK));
    let close: Meanwhile = |guest, lock| guest.flush(lock);
    let close_and_lock: Meanwhile = |guest, lock| {
        assert_eq!(guest.flush(lock), 0);
        guest.set_lock(Lock { range: (5, 5), ..lock })
    };
    for (flags, meanwhile) in [(0, unlock), (FLOCK, unlock), (0, close), (0, close_and_lock)] {
        let (mut one, mut other) = two();
        let (mine, theirs) = (one.lock(flags), other.lock(flags));
        let high = if flags == 0 { (10, TO_THE_END) } else { (0, TO_THE_END) };
        let (mine, theirs) = (Lock { range: high, ..mine }, Lock { range: high, ..theirs });
        assert_eq!(one.set_lock(mine), 0);
        let head = (other.wait_for_lock(theirs, 1), 1);
        assert_eq!(meanwhile(&mut other, theirs), 0);
        assert_eq!(one.set_lock(mine.kind(libc::F_UNLCK)), 0);
        assert_eq!(other.answer_of(&[head]), (1, 0));
        assert_eq!(one.set_lock(mine), libc::EAGAIN, "it has the lock");
        assert_eq!(other.set_lock(theirs.kind(libc::F_UNLCK)), 0);
        assert_eq!(other.set_lock(other_part(theirs).kind(libc::F_UNLCK)), 0);
        assert_eq!(one.set_lock(mine), 0, "and can give it back");
    }
}

/// A close releases the locks of the process, although one of its threads still waits.
#[test]
fn locks_go_with_a_close_beside_a_wait() {
    let (mut one, mut other) = two();
    let low = Lock { range: (0, 4), ..other.lock(0) };
    let (mine, theirs) = (Lock { range: (10, 19), ..one.lock(0) }, Lock { range: (10, 19), ..low });
    assert_eq!((one.set_lock(mine), other.set_lock(low)), (0, 0));
    let head = (other.wait_for_lock(theirs, 1), 1);
    assert_eq!(other.flush(low), 0);
    assert_eq!(one.set_lock(Lock { range: (0, 4), ..mine }), 0);
    assert_eq!(one.set_lock(mine.kind(libc::F_UNLCK)), 0);
    assert_eq!(other.answer_of(&[head]), (1, 0));
}

/// The host executes no program that is open for writing.
#[test]
fn a_lock_for_reading_opens_for_reading() {
    let (mut one, mut other) = two();
    // A read lease is refused while the file is open for writing.
    let file = File::open(one.path("file")).unwrap();
    // SAFETY: the call takes numbers only.
    let lease = |kind: i32| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    for (flags, kind) in [(0, libc::F_RDLCK), (FLOCK, libc::F_RDLCK), (FLOCK, libc::F_WRLCK)] {
        let node = one.lookup(ROOT, "file").unwrap();
        let handle = one.open(OPEN, node, libc::O_RDONLY).unwrap();
        let mine = Lock::whole(node, handle, flags).kind(kind);
        assert_eq!(one.set_lock(mine), 0);
        assert_eq!((lease(libc::F_RDLCK), lease(libc::F_UNLCK)), (0, 0));
        assert_eq!(one.close(RELEASE, node, handle), 0);
    }
    let node = one.lookup(ROOT, "file").unwrap();
    let handle = one.open(OPEN, node, libc::O_RDONLY).unwrap();
    assert_eq!(one.set_lock(Lock::whole(node, handle, 0)), libc::EBADF, "a write lock");
    // A process locks parts for reading, and then writes through another handle.
    let theirs = other.lock(0);
    let node = one.lookup(ROOT, "file").unwrap();
    let reading = one.open(OPEN, node, libc::O_RDONLY).unwrap();
    let writing = one.open(OPEN, node, libc::O_RDWR).unwrap();
    let part = |range, kind, handle| Lock { range, kind, handle, node, owner: 7, flags: 0 };
    for range in [(0, 4), (10, 14), (20, 24)] {
        assert_eq!(one.set_lock(part(range, libc::F_RDLCK, reading)), 0);
    }
    assert_eq!(one.set_lock(part((20, 24), libc::F_UNLCK, reading)), 0);
    assert_eq!(one.set_lock(part((3, 10), libc::F_WRLCK, writing)), 0);
    let at = |at| Lock { range: (at, at), ..theirs };
    for (byte, read, write) in [(0, 0, 11), (3, 11, 11), (10, 11, 11), (12, 0, 11), (20, 0, 0)] {
        assert_eq!(other.set_lock(at(byte).kind(libc::F_RDLCK)), read, "{byte}");
        assert_eq!(other.set_lock(at(byte)), write, "{byte}");
        assert_eq!(other.set_lock(at(byte).kind(libc::F_UNLCK)), 0);
    }
}

#[test]
fn who_waits_can_be_interrupted() {
    for flags in [0, FLOCK] {
        let (mut one, mut other) = two();
        let (mine, theirs) = (one.lock(flags), other.lock(flags));
        assert_eq!(one.set_lock(mine), 0);
        let heads = [2, 4].map(|owner| (other.wait_for_lock(theirs.owner(owner), owner), owner));
        other.interrupt(999);
        other.interrupt(4);
        assert_eq!(other.answer_of(&heads), (4, libc::EINTR));
        other.interrupt(2);
        assert_eq!(other.answer_of(&heads), (2, libc::EINTR));
        // An interrupt may come before its request.
        other.interrupt(6);
        let head = (other.wait_for_lock(theirs.owner(6), 6), 6);
        assert_eq!(other.answer_of(&[head]), (6, libc::EINTR));
        assert_eq!(one.set_lock(mine.kind(libc::F_UNLCK)), 0);
        assert_eq!(other.set_lock(theirs), 0, "nobody who was interrupted has it");
    }
}

#[test]
fn waits_are_bounded_and_end_with_the_device() {
    let (mut one, mut other) = two();
    let (mine, theirs) = (one.lock(FLOCK), Lock { ..other.lock(FLOCK) });
    assert_eq!(one.set_lock(mine), 0);
    let heads: Vec<_> =
        (1..=129).map(|n| (other.wait_for_lock(theirs.owner(n % 50), n), n)).collect();
    assert_eq!(other.answer_of(&heads).1, libc::ENOLCK);
    other.driver.reset();
    let waiting = fs::read_dir("/proc/self/task").unwrap().filter(|task| {
        let name = fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
        name.is_ok_and(|name| name.trim() == "fs-lock")
    });
    // Other tests may have waits meanwhile, but fewer.
    assert!(waiting.count() < 100);
    other.driver.start();
    other.still_serves();
    assert_eq!(one.set_lock(mine.kind(libc::F_UNLCK)), 0);
    assert!(host_gets(&one));
}
