//! Hands out the blocks of a pool. A block is free or in exactly one [`Blocks`].

/// Blocks that somebody owns. Not cloneable, and only [`BlockPool::give_back`] takes it: nothing is freed twice.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Blocks(Vec<u32>);

impl Blocks {
    /// In the order in which the owner fills them.
    pub fn numbers(&self) -> &[u32] {
        &self.0
    }
}

#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Vec<u32>,
    total: u32,
}

impl BlockPool {
    pub fn new(total: u32) -> BlockPool {
        // Low numbers first: a lightly used pool touches little memory.
        BlockPool { free: (0..total).rev().collect(), total }
    }

    /// `count` blocks, or None if fewer are free.
    pub fn take(&mut self, count: usize) -> Option<Blocks> {
        let rest = self.free.len().checked_sub(count)?;
        let mut taken = self.free.split_off(rest);
        taken.reverse();
        Some(Blocks(taken))
    }

    pub fn give_back(&mut self, blocks: Blocks) {
        self.free.extend(blocks.0.into_iter().rev());
        debug_assert!(self.free.len() <= self.total as usize, "more blocks came back than there are");
    }

    pub fn total(&self) -> u32 {
        self.total
    }

    pub fn used(&self) -> u32 {
        self.total - self.free.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::BlockPool;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_block_has_at_most_one_owner(moves in proptest::collection::vec((any::<bool>(), 0usize..9), 0..200)) {
            let mut pool = BlockPool::new(16);
            let mut owned = Vec::new();
            for (take, n) in moves {
                if take {
                    let before = pool.used();
                    match pool.take(n) {
                        Some(blocks) => owned.push(blocks),
                        None => prop_assert!(before as usize + n > 16 && pool.used() == before),
                    }
                } else if !owned.is_empty() {
                    pool.give_back(owned.swap_remove(n % owned.len()));
                }
                let mut held: Vec<u32> = owned.iter().flat_map(|blocks| blocks.numbers().to_vec()).collect();
                prop_assert_eq!(held.len(), pool.used() as usize);
                held.sort_unstable();
                held.dedup();
                prop_assert_eq!(held.len(), pool.used() as usize);
                prop_assert!(held.last().is_none_or(|&last| last < 16));
            }
        }
    }
}
