use super::{BlockPool, Blocks};
use crate::kv::prefix::Chain;
use proptest::prelude::*;

const SALT: [u8; 16] = [7; 16];

/// Fills a table with `tokens` and lets others find it.
fn filled(pool: &mut BlockPool, tokens: &[u32]) -> Blocks {
    let mut blocks = Blocks::default();
    assert!(pool.take(&mut blocks, tokens.len() / 4));
    let mut chain = Chain::new(SALT, 4);
    for (at, &block) in blocks.numbers().iter().enumerate() {
        pool.publish(block, chain.content(at, tokens));
    }
    blocks
}

/// The longest beginning of `tokens` that the pool holds.
fn found(pool: &mut BlockPool, salt: [u8; 16], tokens: &[u32]) -> Blocks {
    let (mut blocks, mut chain) = (Blocks::default(), Chain::new(salt, 4));
    for at in 0..tokens.len() / 4 {
        if !pool.reuse(&mut blocks, chain.content(at, tokens)) {
            break;
        }
    }
    blocks
}

#[test]
fn a_freed_prefix_is_found_until_its_blocks_are_needed_and_its_tail_goes_first() {
    let mut pool = BlockPool::new(6);
    let tokens: Vec<u32> = (0..16).collect();
    let blocks = filled(&mut pool, &tokens);
    let numbers = blocks.numbers().to_vec();
    pool.give_back(blocks);
    assert_eq!((pool.used(), pool.index().len()), (0, 4));
    let again = found(&mut pool, SALT, &tokens);
    assert_eq!(again.numbers(), numbers);
    pool.give_back(again);
    // Two blocks hold nothing; the third that is taken is the tail of what is held.
    let mut other = Blocks::default();
    assert!(pool.take(&mut other, 3));
    assert_eq!(other.numbers()[2], numbers[3]);
    assert_eq!(found(&mut pool, SALT, &tokens).numbers(), &numbers[..3]);
    assert_eq!(pool.index().evicted(), 1);
}

#[test]
fn another_salt_another_parent_or_another_token_is_not_found() {
    let mut pool = BlockPool::new(6);
    let tokens: Vec<u32> = (0..8).collect();
    let blocks = filled(&mut pool, &tokens);
    let mut count = |salt, tokens: &[u32]| {
        let blocks = found(&mut pool, salt, tokens);
        let count = blocks.len();
        pool.give_back(blocks);
        count
    };
    assert_eq!(count(SALT, &tokens), 2);
    assert_eq!(count([8; 16], &tokens), 0);
    assert_eq!(count(SALT, &[0, 1, 2, 3, 4, 5, 6, 9]), 1);
    // The second block alone, with its tokens but without its past.
    assert_eq!(count(SALT, &[4, 5, 6, 7]), 0);
    pool.give_back(blocks);
    pool.forget();
    assert_eq!((found(&mut pool, SALT, &tokens).len(), pool.used()), (0, 0));
}

#[test]
fn the_last_block_of_a_fork_is_copied_when_it_is_written_to_and_only_then() {
    let mut pool = BlockPool::new(4);
    let mut first = Blocks::default();
    assert!(pool.take(&mut first, 2));
    let mut second = pool.share(&first);
    assert_eq!(pool.used(), 2);
    let copy = pool.make_own(&mut second, 1).expect("a free block").expect("a copy");
    assert_eq!((copy.from, copy.to), (first.numbers()[1], second.numbers()[1]));
    assert_eq!(pool.make_own(&mut first, 1), Some(None), "its own already");
    // Block 0 is shared still, and the pool is full after one more.
    assert!(pool.take(&mut first, 1));
    assert_eq!(pool.make_own(&mut second, 0), None);
    pool.give_back(first);
    pool.give_back(second);
    assert_eq!(pool.used(), 0);
}

#[test]
fn what_a_larger_pool_would_have_found_is_known_for_a_while() {
    let mut pool = BlockPool::new(2);
    let tokens: Vec<u32> = (0..8).collect();
    let blocks = filled(&mut pool, &tokens);
    pool.give_back(blocks);
    let key = Chain::new(SALT, 4).content(0, &tokens).key;
    let others = filled(&mut pool, &[9; 8]);
    assert!(pool.index().was_evicted(key));
    pool.give_back(others);
    for n in 0..2 {
        let others = filled(&mut pool, &[20 + n; 8]);
        pool.give_back(others);
    }
    assert!(!pool.index().was_evicted(key));
}

#[test]
fn what_was_lost_twice_is_known_as_long_as_what_was_lost_once() {
    let mut pool = BlockPool::new(4);
    let mut hold = Blocks::default();
    assert!(pool.take(&mut hold, 2));
    // Three evictions are between the two of the first, and one is behind.
    for n in [1, 2, 3, 1, 4, 5, 6] {
        let blocks = filled(&mut pool, &[n; 4]);
        pool.give_back(blocks);
    }
    assert!(pool.index().was_evicted(Chain::new(SALT, 4).content(0, &[1; 4]).key));
    pool.give_back(hold);
}

proptest! {
    #[test]
    fn every_block_has_as_many_owners_as_hold_it(moves in proptest::collection::vec((0u8..4, 0usize..9), 0..200)) {
        let mut pool = BlockPool::new(16);
        let mut owned: Vec<Blocks> = Vec::new();
        for (what, n) in moves {
            let free = pool.free();
            match what {
                0 => {
                    let mut blocks = Blocks::default();
                    let taken = pool.take(&mut blocks, n);
                    prop_assert_eq!((taken, blocks.len()), (n <= free, if taken { n } else { 0 }));
                    owned.push(blocks);
                }
                1 if !owned.is_empty() => {
                    let copy = pool.share(&owned[n % owned.len()]);
                    owned.push(copy);
                }
                2 if !owned.is_empty() => {
                    let at = n % owned.len();
                    if owned[at].len() > 0 {
                        prop_assert!(pool.make_own(&mut owned[at], 0).is_some() || free == 0);
                    }
                }
                _ if !owned.is_empty() => pool.give_back(owned.swap_remove(n % owned.len())),
                _ => {}
            }
            let mut owners = [0; 16];
            owned.iter().flat_map(Blocks::numbers).for_each(|&block| owners[block as usize] += 1);
            for (block, &count) in owners.iter().enumerate() {
                prop_assert_eq!(pool.owners(block as u32), count);
            }
            prop_assert_eq!(pool.used() as usize, owners.iter().filter(|&&count| count > 0).count());
        }
    }
}
