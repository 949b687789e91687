//! Ways to damage a file: flipped bits, cuts, bytes too many, wiped ranges, records twice, another file in its place.

use crate::rng::Rng;

/// How a file was damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Some bits are the other way round.
    Flipped,
    /// The end is missing.
    Cut,
    /// There are more bytes behind the end.
    Extended,
    /// A range is zero.
    Wiped,
    /// A range is there twice.
    Doubled,
    /// A range is missing.
    Removed,
    /// It is another file of a checkpoint.
    Swapped,
}

impl Damage {
    const ALL: [Self; 7] =
        [Self::Flipped, Self::Cut, Self::Extended, Self::Wiped, Self::Doubled, Self::Removed, Self::Swapped];

    /// One of them; flips are the most frequent.
    pub fn choose(rng: &mut Rng) -> Self {
        let turn = usize::try_from(rng.below(10)).unwrap_or_default();
        Self::ALL.get(turn).copied().unwrap_or(Self::Flipped)
    }

    /// The damaged contents of a file, or none where they would be the same. `other` is the file to swap it with.
    pub fn apply(self, contents: &[u8], other: &[u8], rng: &mut Rng) -> Option<Vec<u8>> {
        let mut spoilt = contents.to_vec();
        let len = contents.len();
        let mut below = |end: usize| usize::try_from(rng.below(end as u64)).unwrap_or_default();
        let start = below(len);
        let end = (start + 1 + below(64)).min(len);
        match self {
            Self::Flipped => {
                for _ in 0..=below(8) {
                    let (at, bit) = (below(len), below(8));
                    *spoilt.get_mut(at)? ^= 1 << bit;
                }
            }
            Self::Cut => spoilt.truncate(start),
            Self::Extended => (0..=below(64)).for_each(|_| spoilt.push(below(256).to_le_bytes()[0])),
            Self::Wiped => spoilt[start..end].fill(0),
            Self::Doubled => {
                let range = contents[start..end].to_vec();
                spoilt.splice(end..end, range);
            }
            Self::Removed => drop(spoilt.splice(start..end, [])),
            Self::Swapped => spoilt = other.to_vec(),
        }
        (spoilt != contents).then_some(spoilt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damage_changes_the_file_and_the_same_seed_changes_it_alike() {
        let contents: Vec<u8> = (1..=200).collect();
        for damage in Damage::ALL {
            for seed in 0..200 {
                let spoil = || damage.apply(&contents, b"other", &mut Rng::new(seed));
                let spoilt = spoil();
                assert_eq!(spoilt, spoil());
                if let Some(spoilt) = spoilt {
                    assert_ne!(spoilt, contents, "{damage:?}");
                } else {
                    assert_eq!(damage, Damage::Flipped, "only a bit flipped twice is as it was");
                }
            }
        }
    }

    #[test]
    fn empty_files_are_no_trouble() {
        for damage in Damage::ALL {
            damage.apply(&[], b"", &mut Rng::new(1));
        }
    }
}
