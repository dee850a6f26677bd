//! The configuration of a pod, as containerd's plugin for Kubernetes passes it to the sandbox.

use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};

use crate::error::{Error, Result};

// Written by the code generator at build time.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_mut,
    unused_results,
    clippy::all,
    clippy::restriction
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub(super) use self::generated::cri::{
    DNSConfig, IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace,
};

/// Type of a pod's configuration.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// Reads the options of a sandbox. Without options it is a pod with all defaults.
///
/// # Errors
///
/// If the options are of another type, or malformed.
pub(super) fn decode(options: Option<&Any>) -> Result<PodSandboxConfig> {
    let Some(options) = options else { return Ok(PodSandboxConfig::default()) };
    if options.type_url.rsplit('/').next() != Some(CONFIG) {
        return Err(Error::new(format!(
            "the options of the sandbox have the type {:?}: the shim takes {CONFIG}",
            options.type_url
        )));
    }
    PodSandboxConfig::parse_from_bytes(&options.value)
        .map_err(|error| Error::new(format!("cannot read the pod's configuration: {error}")))
}

/// The content of the pod's resolv.conf, as containerd writes it. `None` for that of the host.
pub(super) fn resolv_conf(dns: Option<&DNSConfig>) -> Option<String> {
    let dns = dns?;
    let mut text = String::new();
    let mut line = |keyword: &str, words: &str| text.push_str(&format!("{keyword} {words}\n"));
    if !dns.searches.is_empty() {
        line("search", &dns.searches.join(" "));
    }
    dns.servers.iter().for_each(|server| line("nameserver", server));
    if !dns.options.is_empty() {
        line("options", &dns.options.join(" "));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_configuration_of_a_pod_is_taken() {
        let config = PodSandboxConfig { hostname: "web".into(), ..PodSandboxConfig::default() };
        let value = config.write_to_bytes().unwrap();
        let of = |type_url: &str, value: &[u8]| {
            let any = Any { type_url: type_url.into(), value: value.into(), ..Any::default() };
            decode(Some(&any)).map_err(|error| error.message)
        };
        assert_eq!(of(CONFIG, &value).unwrap().hostname, "web");
        assert_eq!(of(&format!("type.googleapis.com/{CONFIG}"), &value).unwrap(), config);
        assert_eq!(decode(None).unwrap(), PodSandboxConfig::default());
        assert!(of("runtime.v2.PodSandboxConfig", &value).unwrap_err().contains("have the type"));
        assert!(of(CONFIG, b"\xff").unwrap_err().contains("cannot read"));
    }

    #[test]
    fn name_servers_are_those_of_the_pod() {
        assert_eq!(resolv_conf(None), None);
        assert_eq!(resolv_conf(Some(&DNSConfig::default())).as_deref(), Some(""));
        let dns = DNSConfig {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a".into(), "b".into()],
            options: vec!["ndots:5".into()],
            ..DNSConfig::default()
        };
        let text = "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n";
        assert_eq!(resolv_conf(Some(&dns)).as_deref(), Some(text));
    }
}
