//! The sticky split: weighted rendezvous hashing. Pure; its golden vectors are in `tests/golden/split.txt`.
//!
//! Every variant draws −ln(u)/weight, where u in (0, 1) is a hash of (salt, unit, variant), and the smallest wins
//! (Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005). A changed weight moves only the share that
//! changed, and a new variant takes from each of the others only what it needs, which cumulative ranges do not do.

/// The index of the variant that `unit` gets, or `None` if no weight is above zero.
///
/// `variants` are (name, weight); `salt` keeps experiments independent of each other.
pub fn pick(salt: &str, unit: &str, variants: &[(&str, u32)]) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (index, (name, weight)) in variants.iter().enumerate() {
        if *weight == 0 {
            continue;
        }
        let draw = -uniform(salt, unit, name).ln() / f64::from(*weight);
        if best.is_none_or(|(lowest, _)| draw < lowest) {
            best = Some((draw, index));
        }
    }
    best.map(|(_, index)| index)
}

/// A number in (0, 1) that depends on nothing but its arguments. Lengths are hashed too, so that no two triples of
/// strings run together.
pub fn uniform(salt: &str, unit: &str, variant: &str) -> f64 {
    let mut hash = blake3::Hasher::new_derive_key("glassgate sticky split v1");
    for part in [salt, unit, variant] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let digest = hash.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    // 53 bits fill a double exactly; the half keeps the ends out.
    ((u64::from_le_bytes(first) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TWO: [(&str, u32); 2] = [("glimmer-1", 90), ("glimmer-2", 10)];

    #[test]
    fn shares_follow_the_weights() {
        let count = 100_000;
        let second = (0..count).filter(|i| pick("assistant", &format!("session-{i}"), &TWO) == Some(1)).count();
        // 10 % ± 4 standard deviations of a binomial with n = 100,000.
        assert!((9_620..=10_380).contains(&second), "{second} of {count}");
    }

    #[test]
    fn growth_moves_only_the_delta() {
        let grown = [("glimmer-1", 90), ("glimmer-2", 30)];
        let third = [("glimmer-1", 90), ("glimmer-2", 10), ("glimmer-3", 20)];
        for i in 0..10_000 {
            let unit = format!("session-{i}");
            let before = pick("assistant", &unit, &TWO);
            let after = pick("assistant", &unit, &grown);
            assert!(before == after || after == Some(1), "{unit} moved away from the one that grew");
            let after = pick("assistant", &unit, &third);
            assert!(before == after || after == Some(2), "{unit} moved between old variants");
        }
    }

    #[test]
    fn a_weight_of_zero_gets_nothing_and_no_weights_get_none() {
        assert_eq!(pick("s", "u", &[("a", 0), ("b", 1)]), Some(1));
        assert_eq!(pick("s", "u", &[("a", 0)]), None);
        assert_eq!(pick("s", "u", &[]), None);
    }

    proptest! {
        #[test]
        fn the_order_of_variants_does_not_matter(unit in ".{0,24}", a in 1u32..100, b in 1u32..100, c in 1u32..100) {
            let forward = [("a", a), ("b", b), ("c", c)];
            let backward = [("c", c), ("b", b), ("a", a)];
            let name = |variants: &[(&'static str, u32)]| pick("salt", &unit, variants).map(|i| variants[i].0);
            prop_assert_eq!(name(&forward), name(&backward));
        }
    }
}
