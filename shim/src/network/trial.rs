//! A trial of the host's kernel: a network for a microVM, made once.

use std::thread;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::{
    error::{Error, Explain, Result},
    network::{
        netlink::Netlink,
        redirect::{self, Mark},
        tap::{Life, Tap},
    },
};

/// The results of a trial.
#[derive(Debug)]
pub(crate) struct Trial {
    /// The result of making taps.
    pub(crate) taps: Result<()>,
    /// The result of redirecting frames between two taps. Not tried without taps.
    pub(crate) redirects: Option<Result<()>>,
    /// The result of a filter for the name server of Docker's networks. Not tried without redirects.
    pub(crate) names: Option<Result<()>>,
}

impl Trial {
    fn without_taps(error: Error) -> Self {
        Self { taps: Err(error), redirects: None, names: None }
    }
}

/// Makes two taps and redirects one to the other. A thread of its own does it, in a network
/// namespace that ends with the thread.
pub(crate) fn try_out() -> Trial {
    let tried = thread::Builder::new().spawn(|| -> Trial {
        match taps() {
            Ok((netlink, from, to)) => {
                let redirects =
                    Mark::new().and_then(|mark| redirect::try_out(&netlink, &from, &to, &mark));
                let names = redirects.is_ok().then(|| redirect::try_names(&netlink, &from));
                Trial { taps: Ok(()), redirects: Some(redirects), names }
            }
            Err(error) => Trial::without_taps(error),
        }
    });
    match tried.explain(|| "cannot start a thread".into()) {
        Ok(thread) => {
            thread.join().unwrap_or_else(|_| Trial::without_taps(Error::new("the thread failed")))
        }
        Err(error) => Trial::without_taps(error),
    }
}

fn taps() -> Result<(Netlink, Tap, Tap)> {
    // SAFETY: a new network namespace leaves descriptors and memory as they are.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .explain(|| "cannot make a network namespace".into())?;
    let netlink = Netlink::open()?;
    // Spare taps do not open vhost-net, which is tried elsewhere.
    let tap = |number| Tap::new(&netlink, number, 1, Life::Microvm, true);
    let (from, to) = (tap(0)?, tap(1)?);
    Ok((netlink, from, to))
}
