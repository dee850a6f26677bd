//! An OCI bundle: read and checked whole before anything on the host is touched.

mod annotations;
mod bind;
mod check;
mod default;
mod disk;
mod features;
mod guest_spec;
mod holder_spec;
mod host_socket;
mod id_map;
mod load;
mod mount_options;
mod network_namespace;
mod oci_spec_quirks;
mod owner;
mod pod;
mod pod_files;
mod projected;
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
    annotations::{ANNOTATION_PREFIX, ANNOTATIONS, check_allowed, check_allowed_list},
    bind::Bind,
    default::{capabilities, default_spec, rootless_spec, write_spec},
    disk::{Disk, GuestDisk},
    features::features,
    guest_spec::{GuestContainer, Inner, InnerOf, guest_processors},
    host_socket::HostSocket,
    id_map::IdMap,
    load::{Bundle, check_process, load_process, parse_process},
    network_namespace::NetworkNamespace,
    oci_spec_quirks::SPEC_VERSION,
    pod::{Holder, Joined, is_first_of_pod},
    projected::{MAX_COPIED_BYTES, Projected, VolumeContent, VolumeFile, VolumeState, read_volume},
    propagation::Propagation,
    seccomp::Filter,
    shm::Shm,
    update::{beyond_vm, check_fits, parse_resources, update_resources},
    vm_size::{NICS_ANNOTATION, VmSize},
};
pub(crate) use self::{
    disk::place as place_disks,
    guest_spec::{shared_hook, shared_inner, shared_name},
    holder_spec::{HOLDER_PROGRAM, HolderSpec},
    network_namespace::{RESOLV_CONF, is_network_namespace},
    owner::user as check_user,
    pod::{CONTAINERD_TYPE, POD_ID, is_crios, is_same as is_same_namespace},
    pod_files::PodFiles,
    vm_size::{CONTAINERD_LIMITS, DEFAULT_PERIOD_US},
};

#[cfg(test)]
mod tests;
