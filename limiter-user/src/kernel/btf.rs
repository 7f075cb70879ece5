//! Offsets of fields in the running kernel's structures, from its BTF.
//!
//! The format is that of the kernel's `Documentation/bpf/btf.rst`. Only as much is read as finding a direct member of a
//! structure takes.

use std::{fs, io, path::Path};

/// Where the kernel shows its BTF (since 5.4, `CONFIG_DEBUG_INFO_BTF`).
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

/// A member of a structure, by both names.
pub type Member = (&'static str, &'static str);

/// Where each of these members begins in its structure, in bits; `None` for what the kernel does not have, and for all where it
/// has no BTF.
pub fn offsets(vmlinux: &Path, members: &[Member]) -> io::Result<Vec<Option<u32>>> {
    match fs::read(vmlinux) {
        Ok(data) => Ok(find(&data, members)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![None; members.len()]),
        Err(error) => Err(error),
    }
}

fn find(data: &[u8], members: &[Member]) -> Vec<Option<u32>> {
    let mut found = vec![None; members.len()];
    // What is damaged somewhere is read up to there.
    let _ = find_into(data, members, &mut found);
    found
}

fn find_into(data: &[u8], wanted: &[Member], found: &mut [Option<u32>]) -> Option<()> {
    if u16::from_ne_bytes(data.get(..2)?.try_into().ok()?) != MAGIC {
        return None;
    }
    let header_length = word(data, 4)? as usize;
    let section = |offset_at: usize, length_at: usize| {
        let start = header_length.checked_add(word(data, offset_at)? as usize)?;
        data.get(start..start.checked_add(word(data, length_at)? as usize)?)
    };
    let types = section(8, 12)?;
    let strings = section(16, 20)?;
    let named = |offset: u32, name: &str| {
        let end = offset as usize + name.len();
        strings.get(offset as usize..end) == Some(name.as_bytes()) && strings.get(end) == Some(&0)
    };

    let mut at = 0;
    while at < types.len() {
        let name = word(types, at)?;
        let info = word(types, at + 4)?;
        let members = info as usize & 0xffff;
        let kind = info >> 24 & 0x1f;
        if kind == KIND_STRUCT {
            let has_bitfields = info >> 31 == 1;
            for (&(structure, field), found) in wanted.iter().zip(&mut *found) {
                if found.is_some() || !named(name, structure) {
                    continue;
                }
                *found = (0..members).find_map(|member| {
                    let at = at + 12 + member * 12;
                    let offset_bits = word(types, at + 8)?;
                    // With bitfields in the structure, the upper byte is the member's width.
                    let offset_bits = if has_bitfields { offset_bits & 0x00ff_ffff } else { offset_bits };
                    named(word(types, at)?, field).then_some(offset_bits)
                });
            }
        }
        at += 12 + trailer(kind, members)?;
    }
    Some(())
}

/// How many bytes follow the common part of a type; `None` for a kind that is not known, after which nothing can be read.
const fn trailer(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        // pointer, forward, typedef, volatile, const, restrict, function, float, type tag
        2 | 7 | 8 | 9 | 10 | 11 | 12 | 16 | 18 => 0,
        // integer, variable, declaration tag
        1 | 14 | 17 => 4,
        // array
        3 => 12,
        // structure, union, section, 64-bit enumeration
        4 | 5 | 15 | 19 => 12 * members,
        // enumeration, function prototype
        6 | 13 => 8 * members,
        _ => return None,
    })
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An integer, then `struct point { int x; int y; }`.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0point\0x\0y\0";
        let types: Vec<u32> =
            [[1, 1 << 24, 4].as_slice(), &[32], &[5, KIND_STRUCT << 24 | 2, 8], &[11, 1, 0], &[13, 1, 32]].concat();
        let mut data = Vec::new();
        data.extend(MAGIC.to_ne_bytes());
        data.extend([1, 0]);
        let types_bytes = u32::try_from(types.len() * 4).unwrap();
        for word in [24, 0, types_bytes, types_bytes, u32::try_from(strings.len()).unwrap()] {
            data.extend(word.to_ne_bytes());
        }
        data.extend(types.iter().flat_map(|word| word.to_ne_bytes()));
        data.extend(strings);
        data
    }

    #[test]
    fn finds_a_member_by_name() {
        let wanted = [("point", "y"), ("point", "x"), ("point", "z"), ("line", "x")];
        assert_eq!(find(&sample(), &wanted), [Some(32), Some(0), None, None]);
    }

    proptest! {
        #[test]
        fn damaged_input_never_panics(at in 0_usize..100, byte: u8, cut in 0_usize..100) {
            let mut data = sample();
            if let Some(place) = data.get_mut(at) {
                *place = byte;
            }
            data.truncate(cut);
            let _ = find(&data, &[("point", "y")]);
        }
    }
}
