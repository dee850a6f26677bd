//! Network namespaces that a test makes, as an engine would.

use std::path::Path;

use serde_json::json;

use crate::command::{Command, Output};
use crate::container::Container;
use crate::scope::Scope;

/// A named network namespace. Dropping it deletes the namespace, and fails the test if the runtime
/// has left anything in it.
#[derive(Debug)]
pub struct Netns<'a> {
    scope: &'a Scope,
    name: String,
}

impl<'a> Netns<'a> {
    /// Makes an empty namespace with its loopback interface up.
    pub fn new(scope: &'a Scope, suffix: &str) -> Self {
        let netns = Self { scope, name: format!("{}{suffix}", scope.name()) };
        scope.program(&["ip", "netns", "add", &netns.name]).output().ok();
        netns.ip("link set lo up");
        netns
    }

    /// Makes two namespaces with a veth pair between them: `eth0` in both. In 10.77.0.0/24 and
    /// `fd77::/64` the first one returned has address 2, the second one address 1.
    pub fn pair(scope: &'a Scope, mtu: u32) -> (Self, Self) {
        let (inner, outer) = (Self::new(scope, "in"), Self::new(scope, "out"));
        inner.cable(&outer, "eth0", "eth0", mtu);
        for (netns, host) in [(&inner, 2), (&outer, 1)] {
            netns.address("eth0", &format!("10.77.0.{host}/24"));
            netns.address("eth0", &format!("fd77::{host}/64"));
        }
        inner.ip("route add default via 10.77.0.1");
        inner.ip("route add default via fd77::1");
        (inner, outer)
    }

    /// Adds a veth pair between an interface here and one in `other`, both up.
    pub fn cable(&self, other: &Self, here: &str, there: &str, mtu: u32) {
        let other_name = &other.name;
        self.ip(&format!(
            "link add {here} mtu {mtu} type veth peer name {there} mtu {mtu} netns {other_name}"
        ));
        self.ip(&format!("link set {here} up"));
        other.ip(&format!("link set {there} up"));
    }

    /// Gives an interface an address, usable at once.
    pub fn address(&self, interface: &str, address: &str) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {interface} {nodad}"));
    }

    /// Runs `ip` with these arguments in the namespace.
    #[track_caller]
    pub fn ip(&self, args: &str) -> Output {
        self.program(&["ip"]).args(args.split_whitespace()).output().ok()
    }

    /// Any program, in the namespace.
    pub fn program(&self, argv: &[&str]) -> Command<'a> {
        let net = format!("--net={}", self.path());
        self.scope.program(&[&["nsenter", &*net], argv].concat())
    }

    /// The namespace's path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Fails the test if the namespace has an interface or a redirect of a runtime.
    #[track_caller]
    pub fn assert_untouched(&self) {
        let links = self.program(&["ip", "-oneline", "link"]).output().ok();
        assert!(!links.stdout.contains("isopod"), "{links}");
        let disciplines = self.program(&["tc", "qdisc", "show"]).output().ok();
        assert!(!disciplines.stdout.contains("ingress"), "{disciplines}");
        assert!(!disciplines.stdout.contains("clsact"), "{disciplines}");
    }
}

impl Drop for Netns<'_> {
    fn drop(&mut self) {
        let delete = ["ip", "netns", "delete", &*self.name];
        if std::thread::panicking() {
            // The test has failed already; no panic may hide that.
            let drop = || drop(self.scope.program(&delete).output());
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(drop));
            return;
        }
        self.scope.delete_created();
        self.assert_untouched();
        self.scope.program(&delete).output().ok();
        assert!(!Path::new(&self.path()).exists());
    }
}

impl Container<'_> {
    /// Joins a network namespace.
    #[must_use]
    pub fn join(self, netns: &Netns<'_>) -> Self {
        self.network(&netns.path())
    }

    /// Sets the path of the network namespace.
    #[must_use]
    pub fn network(self, path: &str) -> Self {
        self.edit(|c| {
            let all = c["linux"]["namespaces"].as_array_mut().expect("namespaces");
            let network = all.iter_mut().find(|n| n["type"] == "network");
            network.expect("a network namespace")["path"] = json!(path);
        })
    }
}
