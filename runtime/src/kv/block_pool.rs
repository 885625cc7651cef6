//! Hands out the blocks of a pool. A block is free or has owners; it has more than one only if nobody writes to it any
//! more, or until one of its owners wants to.
//!
//! A freed block remembers what it holds until it is used again: those that hold nothing first, then those that were
//! freed longest ago, and of one sequence its tail before its beginning.

use super::{
    free_list::FreeList,
    prefix::{Content, Index, Key},
};

/// Blocks that somebody owns, perhaps with others. Not cloneable, and only [`BlockPool::give_back`] takes it: nothing is
/// freed twice.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks(Vec<u32>);

impl Blocks {
    /// In the order in which the owner fills them.
    pub fn numbers(&self) -> &[u32] {
        &self.0
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A block whose contents belong into another one before the next step writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockCopy {
    pub from: u32,
    pub to: u32,
}

#[derive(Clone, Debug, Default)]
struct Block {
    owners: u32,
    /// What it holds, if it is full and found by its contents.
    key: Option<Key>,
}

#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    free: FreeList,
    index: Index,
}

impl BlockPool {
    pub fn new(total: u32) -> BlockPool {
        BlockPool {
            blocks: vec![Block::default(); total as usize],
            free: FreeList::full(total),
            index: Index::new(total as usize),
        }
    }

    /// Appends `count` blocks with nothing of use in them. False, and nothing taken: fewer are free.
    pub fn take(&mut self, into: &mut Blocks, count: usize) -> bool {
        if (self.free.len() as usize) < count {
            return false;
        }
        for _ in 0..count {
            let Some(block) = self.free.pop_front() else { return false };
            let state = &mut self.blocks[block as usize];
            state.owners = 1;
            if let Some(key) = state.key.take()
                && !seeded!(StaleHash)
            {
                self.index.evict(key);
            }
            into.0.push(block);
        }
        true
    }

    /// Appends the block with these contents, if there is one.
    pub fn reuse(&mut self, into: &mut Blocks, content: Content) -> bool {
        let Some(block) = self.index.find(content) else { return false };
        self.own(block);
        into.0.push(block);
        true
    }

    /// The same blocks for one more owner.
    pub fn share(&mut self, blocks: &Blocks) -> Blocks {
        blocks.0.iter().for_each(|&block| self.own(block));
        Blocks(blocks.0.clone())
    }

    /// Makes the `at`-th of these blocks the owner's own before it writes there. Some: after this copy. None: no block is
    /// free for it.
    pub fn make_own(&mut self, blocks: &mut Blocks, at: usize) -> Option<Option<BlockCopy>> {
        let from = blocks.0[at];
        if self.blocks[from as usize].owners == 1 || seeded!(ForkWithoutCopy) {
            return Some(None);
        }
        let mut fresh = Blocks::default();
        if !self.take(&mut fresh, 1) {
            return None;
        }
        let to = fresh.0[0];
        blocks.0[at] = to;
        self.disown(from);
        Some(Some(BlockCopy { from, to }))
    }

    /// From now on others find this block by its contents, which are computed and will not change.
    pub fn publish(&mut self, block: u32, content: Content) {
        let state = &mut self.blocks[block as usize];
        if state.key.is_none() && self.index.insert(block, content) {
            state.key = Some(content.key);
        }
    }

    pub fn give_back(&mut self, blocks: Blocks) {
        // The tail first, so that it is used first: without the beginning it is worth nothing.
        for &block in blocks.0.iter().rev() {
            self.disown(block);
        }
    }

    /// What the pool holds is lost. Nobody owns a block.
    pub fn forget(&mut self) {
        self.index.clear();
        *self = BlockPool { index: std::mem::take(&mut self.index), ..BlockPool::new(self.total()) };
    }

    pub fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    pub fn free(&self) -> usize {
        self.free.len() as usize
    }

    pub fn used(&self) -> u32 {
        self.total() - self.free.len()
    }

    pub fn index(&self) -> &Index {
        &self.index
    }

    fn own(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        if state.owners == 0 {
            self.free.remove(block);
        }
        state.owners += 1;
    }

    fn disown(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        state.owners -= 1;
        if state.owners > 0 && !(seeded!(FreedWhileShared) && state.owners == 1) {
            return;
        }
        match state.key {
            Some(_) => self.free.push_back(block),
            None => self.free.push_front(block),
        }
    }

    #[cfg(test)]
    pub fn owners(&self, block: u32) -> u32 {
        self.blocks[block as usize].owners
    }

    #[cfg(test)]
    pub fn is_published(&self, block: u32) -> bool {
        self.blocks[block as usize].key.is_some()
    }
}

#[cfg(test)]
mod tests;
