//! The blocks nobody owns, in the order in which they will be used again. Every operation takes constant time.

/// A ring of links through all blocks and one more, which is its beginning and its end.
#[derive(Debug)]
pub(crate) struct FreeList {
    /// For each block those before and after it; a block that is not free is linked to itself.
    links: Vec<(u32, u32)>,
    len: u32,
}

impl FreeList {
    /// All of `0..total`, low numbers first: a lightly used pool touches little memory.
    pub fn full(total: u32) -> FreeList {
        let mut list = FreeList { links: (0..=total).map(|n| (n, n)).collect(), len: 0 };
        (0..total).for_each(|block| list.push_back(block));
        list
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    /// The next to be used.
    pub fn push_front(&mut self, block: u32) {
        self.insert(block, self.end());
    }

    /// The last to be used.
    pub fn push_back(&mut self, block: u32) {
        self.insert(block, self.links[self.end() as usize].0);
    }

    pub fn pop_front(&mut self) -> Option<u32> {
        let first = self.links[self.end() as usize].1;
        (first != self.end()).then(|| {
            self.remove(first);
            first
        })
    }

    /// `block` is free.
    pub fn remove(&mut self, block: u32) {
        let (before, after) = self.links[block as usize];
        self.links[before as usize].1 = after;
        self.links[after as usize].0 = before;
        self.links[block as usize] = (block, block);
        self.len -= 1;
    }

    fn insert(&mut self, block: u32, before: u32) {
        let after = self.links[before as usize].1;
        self.links[block as usize] = (before, after);
        self.links[before as usize].1 = block;
        self.links[after as usize].0 = block;
        self.len += 1;
    }

    fn end(&self) -> u32 {
        self.links.len() as u32 - 1
    }
}
