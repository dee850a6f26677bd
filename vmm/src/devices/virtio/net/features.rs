//! Feature bits of a network device (5.1.3), and the offloads of its tap.

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const GUEST_UFO: u64 = 1 << 10;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const HOST_UFO: u64 = 1 << 14;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const MQ: u64 = 1 << 22;
pub(super) const GUEST_USO4: u64 = 1 << 54;
pub(super) const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;

/// Features over every tap with a header: checksums and TCP segments, in both directions.
const BASE: u64 = CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF;

/// Features with the offloads that the tap must support. The kernel supports each in both
/// directions.
const OPTIONAL: [(libc::c_uint, u64); 2] = [
    (libc::TUN_F_UFO, GUEST_UFO | HOST_UFO),
    (libc::TUN_F_USO4 | libc::TUN_F_USO6, GUEST_USO4 | GUEST_USO6 | HOST_USO),
];

/// Features by which packets of more than one frame may arrive.
pub(super) const GUEST_SEGMENTS: u64 =
    GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;

/// Returns the features over a tap. `takes` returns true if the tap supports these offloads.
pub(super) fn of_tap(takes: impl Fn(libc::c_uint) -> bool) -> u64 {
    OPTIONAL
        .iter()
        .filter(|(offloads, _)| takes(libc::TUN_F_CSUM | offloads))
        .fold(BASE, |all, (_, features)| all | features)
}

/// Returns the offloads for the accepted features. The kernel would refuse all of them if one
/// lacked the feature that it depends on (5.1.3.1), so such an offload is left out.
pub(super) fn offloads(accepted: u64) -> libc::c_uint {
    let has = |features: u64| accepted & features == features;
    if !has(GUEST_CSUM) {
        return 0;
    }
    let tso = accepted & (GUEST_TSO4 | GUEST_TSO6) != 0;
    [
        (has(GUEST_TSO4), libc::TUN_F_TSO4),
        (has(GUEST_TSO6), libc::TUN_F_TSO6),
        (has(GUEST_ECN) && tso, libc::TUN_F_TSO_ECN),
        (has(GUEST_UFO), libc::TUN_F_UFO),
        // The kernel supports both or neither.
        (has(GUEST_USO4 | GUEST_USO6), libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ]
    .into_iter()
    .filter(|(accepted, _)| *accepted)
    .fold(libc::TUN_F_CSUM, |all, (_, offloads)| all | offloads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offload_without_what_it_builds_on_is_left_out() {
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(GUEST_TSO4 | GUEST_ECN | GUEST_UFO), 0);
        assert_eq!(offloads(GUEST_CSUM | GUEST_ECN | GUEST_USO4), libc::TUN_F_CSUM);
        let all = libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        assert_eq!(offloads(GUEST_CSUM | GUEST_TSO6 | GUEST_ECN | CSUM | HOST_TSO4), all);
    }

    #[test]
    fn a_tap_that_knows_less_offers_less() {
        assert_eq!(of_tap(|_| false), BASE);
        let ufo = of_tap(|offloads| offloads & libc::TUN_F_USO4 == 0);
        assert_eq!(ufo, BASE | GUEST_UFO | HOST_UFO);
        assert_eq!(of_tap(|_| true) & HOST_USO, HOST_USO);
    }
}
