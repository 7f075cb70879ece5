//! Where fields of the kernel's structures are that the programs read, as constants for them.

use std::{io, path::Path};

use limiter_common::abi::{self, KernelField};

use super::{
    btf::{self, VMLINUX},
    features::Feature,
};

/// Offsets by the name of the constant, each 0 where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// [`abi::GLOBAL_SNT_ISN_OFFSET`]
    pub snt_isn: u32,
    /// In the order of [`abi::LISTENER_FIELDS`].
    pub listener: [u32; abi::LISTENER_FIELDS.len()],
}

impl Offsets {
    /// Those of the running kernel.
    pub fn of_kernel() -> io::Result<Self> {
        if Feature::Btf.is_hidden() {
            return Ok(Self::default());
        }
        let fields = abi::LISTENER_FIELDS.iter().flat_map(|field| field.path);
        let wanted: Vec<btf::Member> = [abi::SNT_ISN].iter().chain(fields).copied().collect();
        Ok(Self::from_bits(&btf::offsets(Path::new(VMLINUX), &wanted)?))
    }

    /// From those of each member on the way to each field.
    fn from_bits(found: &[Option<u32>]) -> Self {
        let mut found = found.iter().copied();
        let snt_isn = found.next().flatten().and_then(in_bytes).unwrap_or(0);
        let listener = abi::LISTENER_FIELDS.map(|field| {
            // As many as there are members on the way, whatever is among them.
            let way: Vec<Option<u32>> = found.by_ref().take(field.path.len()).collect();
            let bits = way.into_iter().sum::<Option<u32>>()?;
            if field.in_bits { Some(bits) } else { in_bytes(bits) }
        });
        let is_whole = |(known, field): (&Option<u32>, &KernelField)| known.is_some() || field.is_optional;
        let is_known = listener.iter().zip(&abi::LISTENER_FIELDS).all(is_whole);
        let listener = listener.map(|offset| if is_known { offset.unwrap_or(0) } else { 0 });
        Self { snt_isn, listener }
    }
}

/// `None` if it does not begin with a byte.
fn in_bytes(bits: u32) -> Option<u32> {
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every member at 8 bits more than the one before.
    fn all() -> Vec<Option<u32>> {
        let count: usize = 1 + abi::LISTENER_FIELDS.iter().map(|field| field.path.len()).sum::<usize>();
        (1..).map(|number| Some(number * 8)).take(count).collect()
    }

    fn place_of(global: &str) -> usize {
        abi::LISTENER_FIELDS.iter().position(|field| field.global == global).unwrap()
    }

    #[test]
    fn a_field_is_where_its_structures_are_one_in_the_other() {
        let offsets = Offsets::from_bits(&all());
        assert_eq!(offsets.snt_isn, 1);
        // sock.__sk_common, sock_common.skc_net
        assert_eq!(offsets.listener[place_of("SOCK_NET")], 2 + 3);
        assert_eq!(offsets.listener[place_of("SOCK_USERLOCKS")], 5 * 8, "in bits");
    }

    #[test]
    fn without_one_field_none_is_known_but_where_it_may_be_missing() {
        let mut found = all();
        found[3] = None;
        assert_eq!(Offsets::from_bits(&found), Offsets { snt_isn: 1, ..Offsets::default() });
        let mut found = all();
        let ratio = place_of("TCP_SCALING_RATIO");
        let at = 1 + abi::LISTENER_FIELDS[..ratio].iter().map(|field| field.path.len()).sum::<usize>();
        found[at] = None;
        let offsets = Offsets::from_bits(&found);
        assert_eq!(offsets.listener[ratio], 0);
        assert_eq!(offsets.listener[place_of("SOCK_NET")], 5);
    }

    #[test]
    fn a_field_that_begins_within_a_byte_is_not_known() {
        let mut found = all();
        found[0] = Some(9);
        assert_eq!(Offsets::from_bits(&found).snt_isn, 0);
    }

    #[test]
    fn without_btf_nothing_is_known() {
        assert_eq!(Offsets::from_bits(&vec![None; all().len()]), Offsets::default());
    }
}
