//! What the host's kernel can do for a network, by doing it once.

use std::thread;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{
    netlink::Netlink,
    redirect::{self, Mark},
    tap::{Life, Tap},
};
use crate::error::{Error, Explain, Result};

/// What came of it.
#[derive(Debug)]
pub(crate) struct Trial {
    /// Whether there can be taps.
    pub(crate) taps: Result<()>,
    /// Whether frames can be redirected between two. Not tried without taps.
    pub(crate) redirects: Result<()>,
}

/// Makes two taps and redirects one to the other, in a network namespace that ends with a thread of its
/// own.
pub(crate) fn try_out() -> Trial {
    let tried = thread::Builder::new().spawn(|| -> Trial {
        match taps() {
            Ok((netlink, from, to)) => {
                let redirects =
                    Mark::new().and_then(|mark| redirect::try_out(&netlink, &from, &to, &mark));
                Trial { taps: Ok(()), redirects }
            }
            Err(error) => Trial { taps: Err(error), redirects: Ok(()) },
        }
    });
    let failed = |error| Trial { taps: Err(error), redirects: Ok(()) };
    match tried.explain(|| "cannot start a thread".into()) {
        Ok(thread) => thread.join().unwrap_or_else(|_| failed(Error::new("the thread failed"))),
        Err(error) => failed(error),
    }
}

fn taps() -> Result<(Netlink, Tap, Tap)> {
    // SAFETY: a new network namespace leaves descriptors and memory as they are.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .explain(|| "cannot make a network namespace".into())?;
    let netlink = Netlink::open()?;
    // Spare ones open no vhost-net, which is looked at elsewhere.
    let tap = |number| Tap::new(&netlink, number, 1, Life::Microvm, true);
    let (from, to) = (tap(0)?, tap(1)?);
    Ok((netlink, from, to))
}
