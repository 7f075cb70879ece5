//! Whether text is UTF-8, as its bytes come in.

use std::str;

/// Bytes that are unmasked at once where not everything is ASCII.
const CHUNK: usize = 1024;

/// A check of one text, in as many pieces as it comes in.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Utf8 {
    /// The beginning of a character whose end has not come yet.
    partial: [u8; 3],
    len: u8,
}

impl Utf8 {
    /// Takes the next bytes, which are masked; false: this can't be UTF-8 any more.
    #[must_use]
    pub(super) fn push(&mut self, mut bytes: &[u8], mut mask: [u8; 4]) -> bool {
        if self.len == 0 && is_ascii(bytes, mask) {
            return true;
        }
        let mut plain = [0; CHUNK];
        while !bytes.is_empty() {
            let kept = usize::from(self.len);
            plain[..kept].copy_from_slice(&self.partial[..kept]);
            let taken = bytes.len().min(CHUNK - kept);
            let (now, later) = bytes.split_at(taken);
            for (plain, (byte, mask)) in plain[kept..].iter_mut().zip(now.iter().zip(mask.iter().cycle())) {
                *plain = byte ^ mask;
            }
            bytes = later;
            mask.rotate_left(taken % 4);
            let plain = &plain[..kept + taken];
            let rest = match str::from_utf8(plain) {
                Ok(_) => &[],
                Err(error) if error.error_len().is_some() => return false,
                Err(error) => &plain[error.valid_up_to()..],
            };
            // A character whose end is missing has three bytes at most.
            self.partial[..rest.len()].copy_from_slice(rest);
            #[expect(clippy::cast_possible_truncation, reason = "three at most")]
            {
                self.len = rest.len() as u8;
            }
        }
        true
    }

    /// Whether the text may end here.
    pub(super) fn is_complete(self) -> bool {
        self.len == 0
    }
}

/// Whether the bytes are all ASCII once they are unmasked. Most text is, and then it needs no copy.
fn is_ascii(bytes: &[u8], mask: [u8; 4]) -> bool {
    let mask = u32::from_ne_bytes(mask);
    let wide = u64::from(mask) << 32 | u64::from(mask);
    let (blocks, rest) = bytes.as_chunks::<64>();
    for block in blocks {
        let mut high = 0;
        for word in block.as_chunks::<8>().0 {
            high |= u64::from_ne_bytes(*word) ^ wide;
        }
        if high & 0x8080_8080_8080_8080 != 0 {
            return false;
        }
    }
    rest.iter().zip(mask.to_ne_bytes().iter().cycle()).all(|(byte, mask)| (byte ^ mask).is_ascii())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn masked(text: &[u8], mask: [u8; 4]) -> Vec<u8> {
        text.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect()
    }

    /// Pushes it in pieces; gives what the check of the whole would.
    fn in_pieces(text: &[u8], mut mask: [u8; 4], cuts: &[usize]) -> bool {
        let bytes = masked(text, mask);
        let mut rest = &bytes[..];
        let mut utf8 = Utf8::default();
        for cut in cuts {
            let (now, later) = rest.split_at(*cut.min(&rest.len()));
            if !utf8.push(now, mask) {
                return false;
            }
            mask.rotate_left(now.len() % 4);
            rest = later;
        }
        utf8.push(rest, mask) && utf8.is_complete()
    }

    #[test]
    fn a_character_cut_in_two_is_whole_again() {
        for cut in 0..4 {
            assert!(in_pieces("😀".as_bytes(), [9, 8, 7, 6], &[cut]), "{cut}");
        }
        assert!(!in_pieces(&"😀".as_bytes()[..3], [0; 4], &[1]), "its end is missing");
    }

    #[test]
    fn what_can_not_become_a_character_is_told_before_its_end() {
        let mut utf8 = Utf8::default();
        assert!(!utf8.push(&[0xed, 0xa0], [0; 4]), "half of a surrogate");
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_standard_library_however_the_bytes_are_cut(
            mut text in prop_oneof![
                "\\PC{0,2000}".prop_map(String::into_bytes),
                proptest::collection::vec(any::<u8>(), 0..40),
                "[ -~]{0,2000}".prop_map(String::into_bytes),
            ],
            wrong in proptest::option::of((any::<prop::sample::Index>(), any::<u8>())),
            mask in any::<[u8; 4]>(),
            cuts in proptest::collection::vec(0..700usize, 0..12),
        ) {
            if let (Some((place, byte)), false) = (wrong, text.is_empty()) {
                let place = place.index(text.len());
                text[place] = byte;
            }
            prop_assert_eq!(in_pieces(&text, mask, &cuts), str::from_utf8(&text).is_ok());
        }
    }
}
