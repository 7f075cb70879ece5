//! Addresses as they lie in the maps.

/// An IPv6 address, or an IPv4 address in its IPv4-mapped form (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2): 16 bytes in
/// network order, held as four words so that the kernel programs move it word by word.
///
/// The mapped form is also what a dual-stack socket reports, so one connection has one key however the listener was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Address {
    /// Each word holds four bytes of the address in memory order, whatever the host's byte order is.
    words: [u32; 4],
}

/// The third word of every IPv4-mapped address, in memory order.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Address {
    /// From the four bytes of an IPv4 address, read as one word in memory order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// From the sixteen bytes of an IPv6 address, read as four words in memory order.
    #[inline(always)]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// Whether this is an IPv4 address in mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The address as four words in memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The IPv4 address as a word in memory order; only meaningful where [`Self::is_v4`].
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// The address with all bits after the first `prefix` cleared. `prefix` counts in the address's own family: 0 to 32
    /// for IPv4, 0 to 128 for IPv6; more is taken as all.
    #[inline(always)]
    #[must_use]
    pub const fn masked(&self, prefix: u8) -> Self {
        let [first, second, third, fourth] = self.words;
        if self.is_v4() {
            let [mask, _] = mask(prefix);
            Self { words: [0, 0, MAPPED, fourth & mask] }
        } else if prefix <= 64 {
            let [first_mask, second_mask] = mask(prefix);
            Self { words: [first & first_mask, second & second_mask, 0, 0] }
        } else {
            let [third_mask, fourth_mask] = mask(prefix - 64);
            Self { words: [first, second, third & third_mask, fourth & fourth_mask] }
        }
    }
}

/// A mask of the first `bits` bits of two words in memory order. 64 are all; so are more.
#[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
#[inline(always)]
const fn mask(bits: u8) -> [u32; 2] {
    let mask = match u64::MAX.checked_shr(bits as u32) {
        Some(rest) => !rest,
        None => u64::MAX,
    };
    [((mask >> 32) as u32).to_be(), (mask as u32).to_be()]
}

#[cfg(any(test, feature = "user"))]
mod host {
    use super::Address;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    #[cfg(feature = "user")]
    unsafe impl aya::Pod for Address {}

    impl From<IpAddr> for Address {
        fn from(ip: IpAddr) -> Self {
            let octets = match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(octets.as_chunks::<4>().0) {
                *word = u32::from_ne_bytes(*bytes);
            }
            Self { words }
        }
    }

    impl From<Address> for IpAddr {
        /// IPv4-mapped addresses come back as IPv4.
        fn from(address: Address) -> Self {
            let mut octets = [0; 16];
            for (bytes, word) in octets.as_chunks_mut::<4>().0.iter_mut().zip(address.words) {
                *bytes = word.to_ne_bytes();
            }
            if address.is_v4() {
                let [.., a, b, c, d] = octets;
                Self::V4(Ipv4Addr::new(a, b, c, d))
            } else {
                Self::V6(Ipv6Addr::from(octets))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn v4_round_trips(octets: [u8; 4]) {
            let ip = IpAddr::V4(Ipv4Addr::from(octets));
            prop_assert_eq!(IpAddr::from(Address::from(ip)), ip);
            prop_assert_eq!(Address::from(ip), Address::from_v4_word(u32::from_ne_bytes(octets)));
        }

        #[test]
        fn v6_round_trips(octets: [u8; 16]) {
            let ip = IpAddr::V6(Ipv6Addr::from(octets));
            let back = IpAddr::from(Address::from(ip));
            prop_assert_eq!(back, ip.to_canonical());
        }

        #[test]
        fn masks_match_integer_arithmetic(v4: u32, v6: u128, prefix in 0_u8..=140) {
            let mask4 = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
            let masked = Address::from(IpAddr::V4(Ipv4Addr::from(v4))).masked(prefix);
            prop_assert_eq!(IpAddr::from(masked), IpAddr::V4(Ipv4Addr::from(v4 & mask4)));

            // Outside ::ffff:0:0/96, where the address would be taken for IPv4.
            let v6 = v6 | 1 << 127;
            let mask6 = u128::MAX.checked_shl(128_u32.saturating_sub(prefix.into())).unwrap_or(0);
            let masked = Address::from(IpAddr::V6(Ipv6Addr::from(v6))).masked(prefix);
            prop_assert_eq!(IpAddr::from(masked), IpAddr::V6(Ipv6Addr::from(v6 & mask6)));
        }
    }
}
