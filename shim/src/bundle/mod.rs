//! An OCI bundle: read and checked whole before anything on the host is touched.

mod bind;
mod check;
mod default;
mod features;
mod guest_spec;
mod id_map;
mod load;
mod mount_options;
mod network_namespace;
mod oci_spec_quirks;
mod owner;
mod pod;
mod propagation;
mod refused_fields;
mod resources;
mod scheduling;
mod seccomp;
mod shm;
mod unknown_fields;
mod update;
mod vm_size;

pub use self::{
    bind::Bind,
    default::{capabilities, default_spec, rootless_spec, write_spec},
    features::features,
    guest_spec::{GuestContainer, Inner, InnerOf, guest_processors},
    id_map::IdMap,
    load::{Bundle, check_process, load_process},
    network_namespace::NetworkNamespace,
    oci_spec_quirks::SPEC_VERSION,
    pod::{Joined, is_first_of_pod},
    propagation::Propagation,
    seccomp::Filter,
    shm::Shm,
    update::{beyond_vm, check_fits, parse_resources, update_resources},
    vm_size::{NICS_ANNOTATION, VmSize},
};
pub(crate) use self::{
    guest_spec::{shared_hook, shared_inner, shared_name},
    network_namespace::{RESOLV_CONF, is_network_namespace},
    owner::user as check_user,
    vm_size::DEFAULT_PERIOD_US,
};

#[cfg(test)]
mod tests;
