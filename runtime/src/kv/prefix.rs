//! What full blocks hold, so that a prompt that begins like an earlier one need not be computed again.
//!
//! A block is known by a chained hash over everything up to its end, and by what was hashed last: its own tokens, its
//! parent's hash and the salt are compared too. Sequences with different salts never share a block.

use std::collections::{BTreeMap, HashMap};

/// 128 bits of a keyed blake3 over (parent, salt, tokens).
pub(crate) type Key = u128;
pub(crate) type Salt = [u8; 16];

/// Keeps these hashes apart from all others made of the same bytes.
const DOMAIN: &[u8; 32] = b"glassgate: a block of KV prefix.";

/// One full block of a sequence, and all that its keys and values depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content<'a> {
    pub key: Key,
    parent: Key,
    salt: Salt,
    tokens: &'a [u32],
}

/// The keys of a sequence's full blocks, computed when they are first asked for.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    salt: Salt,
    block_tokens: usize,
    keys: Vec<Key>,
}

impl Chain {
    pub fn new(salt: Salt, block_tokens: usize) -> Chain {
        Chain { salt, block_tokens, keys: Vec::new() }
    }

    /// The sequence's `at`-th block, which is full. `tokens`: those of the whole sequence.
    pub fn content<'a>(&mut self, at: usize, tokens: &'a [u32]) -> Content<'a> {
        while self.keys.len() <= at {
            let n = self.keys.len();
            let parent = self.keys.last().copied().unwrap_or(0);
            self.keys.push(hash(parent, self.salt, self.block(n, tokens)));
        }
        let parent = if at == 0 { 0 } else { self.keys[at - 1] };
        Content { key: self.keys[at], parent, salt: self.salt, tokens: self.block(at, tokens) }
    }

    fn block<'a>(&self, at: usize, tokens: &'a [u32]) -> &'a [u32] {
        &tokens[at * self.block_tokens..(at + 1) * self.block_tokens]
    }
}

fn hash(parent: Key, salt: Salt, tokens: &[u32]) -> Key {
    let salt = if seeded!(SaltForgotten) { Salt::default() } else { salt };
    let mut bytes = Vec::with_capacity(32 + 4 * tokens.len());
    bytes.extend_from_slice(&parent.to_le_bytes());
    bytes.extend_from_slice(&salt);
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    let mut key = [0; 16];
    key.copy_from_slice(&blake3::keyed_hash(DOMAIN, &bytes).as_bytes()[..16]);
    Key::from_le_bytes(key)
}

#[derive(Debug)]
struct Held {
    block: u32,
    parent: Key,
    salt: Salt,
    tokens: Box<[u32]>,
}

/// Full blocks by what they hold.
#[derive(Debug, Default)]
pub(crate) struct Index {
    held: HashMap<Key, Held>,
    /// The last that were forgotten, with the number of their eviction, at most `remembered_max`: to tell what a larger
    /// pool would have found.
    missed: HashMap<Key, u64>,
    /// The other way round.
    evictions: BTreeMap<u64, Key>,
    remembered_max: usize,
    evicted: u64,
}

impl Index {
    pub fn new(remembered_max: usize) -> Index {
        Index { remembered_max, ..Index::default() }
    }

    pub fn find(&self, content: Content) -> Option<u32> {
        let held = self.held.get(&content.key)?;
        let same_salt = held.salt == content.salt || seeded!(SaltForgotten);
        let same = same_salt && held.parent == content.parent && *held.tokens == *content.tokens;
        same.then_some(held.block)
    }

    /// False: another block holds the same already.
    pub fn insert(&mut self, block: u32, content: Content) -> bool {
        let Content { key, parent, salt, tokens } = content;
        if self.held.contains_key(&key) {
            return false;
        }
        if let Some(number) = self.missed.remove(&key) {
            self.evictions.remove(&number);
        }
        self.held.insert(key, Held { block, parent, salt, tokens: tokens.into() });
        true
    }

    /// The block will hold something else.
    pub fn evict(&mut self, key: Key) {
        self.held.remove(&key);
        self.evicted += 1;
        if self.evictions.len() >= self.remembered_max
            && let Some((_, oldest)) = self.evictions.pop_first()
        {
            self.missed.remove(&oldest);
        }
        self.evictions.insert(self.evicted, key);
        self.missed.insert(key, self.evicted);
    }

    pub fn clear(&mut self) {
        self.held.clear();
        self.missed.clear();
        self.evictions.clear();
    }

    /// Whether a block with this key was here not long ago.
    pub fn was_evicted(&self, key: Key) -> bool {
        self.missed.contains_key(&key)
    }

    /// Blocks that were used for something else, since the load.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    pub fn len(&self) -> usize {
        self.held.len()
    }
}
