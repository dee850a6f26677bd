//! CPUID of the guest's processors.
//!
//! The base is the CPUID that KVM supports (`KVM_GET_SUPPORTED_CPUID`). Leaves that describe the
//! host's topology are rewritten to the guest's: one package, a core for each vCPU, one thread a
//! core. Virtualisation extensions are hidden unless the configuration asks for them. A guest that
//! uses them runs KVM's code for nested guests, the largest part of KVM that a guest can reach.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE_INTEL: u32 = 0x4;
const LEAF_PERFMON: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
/// Features of AMD's virtualisation extensions (SVM).
const LEAF_AMD_SVM: u32 = 0x8000_000a;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_PERFMON: u32 = 0x8000_0022;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

// CPUID.1:ECX
const ECX_VMX: u32 = 1 << 5;
const ECX_SMX: u32 = 1 << 6;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
// CPUID.1:EDX
const EDX_HTT: u32 = 1 << 28;
// CPUID.8000_0001H:ECX: virtualisation and performance counter extensions of AMD.
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const ECX_SVM: u32 = 1 << 2;
const ECX_SKINIT: u32 = 1 << 12;
const ECX_PERFCTR_CORE: u32 = 1 << 23;
const ECX_PERFCTR_NB: u32 = 1 << 24;
const ECX_PERFCTR_LLC: u32 = 1 << 28;

/// Returns the CPUID entries of one vCPU.
///
/// `supported` is KVM's answer, `index` the vCPU's number and APIC id, `vcpus` the number of vCPUs.
/// With `nested` the vCPU has the virtualisation extensions that KVM supports.
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8, nested: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|e| !matches!(e.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_AMD_TOPOLOGY_V2))
        .collect();
    for entry in &mut entries {
        adjust(entry, index, vcpus);
        if !nested {
            hide_virtualisation(entry);
        }
    }
    entries.extend(topology(index, vcpus));
    entries
}

fn hide_virtualisation(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        LEAF_FEATURES => entry.ecx &= !(ECX_VMX | ECX_SMX),
        LEAF_AMD_FEATURES => entry.ecx &= !(ECX_SVM | ECX_SKINIT),
        LEAF_AMD_SVM => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8) {
    let id = u32::from(index);
    let count = u32::from(vcpus);
    match entry.function {
        LEAF_FEATURES => {
            // EBX: initial APIC id, and logical processors of the package (SDM 3.3, "CPUID").
            entry.ebx = (id << 24) | (count << 16) | (entry.ebx & 0xffff);
            // KVM does not list the deadline timer here, because it depends on the in-kernel local
            // APIC. Without the timer the guest calibrates against a clock, which takes most of a
            // boot.
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
            if vcpus > 1 { entry.edx |= EDX_HTT } else { entry.edx &= !EDX_HTT }
        }
        LEAF_CACHE_INTEL if entry.eax & 0x1f != 0 => {
            // EAX[31:26]: cores of the package less one. EAX[25:14]: threads that share this cache
            // less one. All threads share the last level. Every other cache belongs to one thread.
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((count - 1) << 26);
        }
        // The guest has no performance counters: the state of a vCPU does not hold them, and
        // probing for them costs exits.
        LEAF_PERFMON | LEAF_AMD_PERFMON => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        LEAF_AMD_FEATURES => {
            entry.ecx &= !(ECX_PERFCTR_CORE | ECX_PERFCTR_NB | ECX_PERFCTR_LLC);
        }
        // ECX[7:0]: threads of the package less one. ECX[15:12]: APIC id bits that number them.
        LEAF_AMD_SIZES => {
            entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (id_bits(vcpus) << 12);
        }
        LEAF_AMD_CACHE if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & !0x03ff_c000) | (sharing << 14);
        }
        LEAF_AMD_TOPOLOGY => {
            entry.eax = id;
            entry.ebx = id & 0xff; // core id; one thread a core
            entry.ecx = 0; // node 0, one node
            entry.edx = 0;
        }
        _ => {}
    }
}

/// Returns leaf 0xb: a thread level with one processor, and a core level with all.
fn topology(index: u8, vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    let level = |number: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: number | (kind << 8),
        edx: index.into(),
        ..Default::default()
    };
    [level(0, 0, 1, SMT), level(1, id_bits(vcpus), vcpus.into(), CORE), level(2, 0, 0, 0)]
}

/// Number of APIC id bits that number the vCPUs.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_sees_itself_and_the_others() {
        let supported = CpuId::from_entries(&[
            kvm_cpuid_entry2 { function: 1, ebx: 0x0708_0800, ..Default::default() },
            kvm_cpuid_entry2 { function: 0xb, index: 0, edx: 99, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x8000_0008, ecx: 0x700f, ..Default::default() },
        ])
        .unwrap();
        let entries = for_vcpu(&supported, 3, 5, false);
        let features = find(&entries, 1, 0);
        assert_eq!(features.ebx, 0x0305_0800);
        assert_ne!(features.ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(features.edx & EDX_HTT, 0);
        assert_eq!(find(&entries, 0xb, 1).ebx, 5);
        assert_eq!(find(&entries, 0xb, 1).eax, 3);
        assert_eq!(find(&entries, 0xb, 0).edx, 3);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x3004);
    }

    #[test]
    fn virtualisation_is_there_only_if_asked_for_and_counters_never() {
        let all = |function| {
            let (eax, ebx, ecx, edx) = (!0, !0, !0, !0);
            kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
        };
        let leaves = [1, 0xa, 0x8000_0001, 0x8000_000a, 0x8000_0022].map(all);
        let supported = CpuId::from_entries(&leaves).unwrap();
        for nested in [false, true] {
            let entries = for_vcpu(&supported, 0, 1, nested);
            let has = |function, bits: u32| find(&entries, function, 0).ecx & bits == bits;
            for (leaf, bit) in [(1, 5), (1, 6), (0x8000_0001, 2), (0x8000_0001, 12)] {
                assert_eq!(has(leaf, 1 << bit), nested, "leaf {leaf:x}, bit {bit}");
            }
            assert_eq!(find(&entries, 0x8000_000a, 0).eax != 0, nested);
            assert!(has(1, 1 << 23), "what is no virtualisation stays");
            for bit in [23, 24, 28] {
                assert!(!has(0x8000_0001, 1 << bit), "performance counters, bit {bit}");
            }
            for leaf in [0xa, 0x8000_0022] {
                let entry = find(&entries, leaf, 0);
                assert_eq!((entry.eax, entry.ebx, entry.ecx, entry.edx), (0, 0, 0, 0));
            }
        }
    }
}
