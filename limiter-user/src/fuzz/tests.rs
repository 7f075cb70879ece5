//! The seeds, and inputs that differ a little from them: what the fuzzer begins with holds in every test run.

use std::{collections::BTreeSet, fs, path::PathBuf};

use super::TARGETS;

const ROUNDS: u32 = 200;

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name("fuzz").join("corpus")
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = fs::read_dir(corpus().join(target)).unwrap();
    folder.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect()
}

#[test]
fn each_target_has_seeds_and_no_others_have() {
    let folders: BTreeSet<String> =
        fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(folders, names);
    for name in names {
        assert!(!seeds(&name).is_empty(), "{name}");
    }
}

#[test]
fn the_seeds_hold_and_so_does_what_is_near_them() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for (name, target) in TARGETS {
        println!("{name}");
        target(&[]);
        for seed in seeds(name) {
            target(&seed);
            for _ in 0..ROUNDS {
                let mut near = seed.clone();
                for _ in 0..random.u8(1..4) {
                    change(&mut near, &mut random);
                }
                // For whoever looks for what made it fail.
                println!("{near:?}");
                target(&near);
            }
        }
    }
}

fn change(bytes: &mut Vec<u8>, random: &mut fastrand::Rng) {
    let at = random.usize(0..=bytes.len());
    match random.u8(0..4) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, random.u8(..)),
        2 => {
            let piece = bytes[random.usize(0..=at)..at].to_vec();
            bytes.splice(at..at, piece);
        }
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.u8(0..8);
            }
        }
    }
}
