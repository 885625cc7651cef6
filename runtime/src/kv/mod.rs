//! Who owns which block of the KV pool, and what full blocks hold. Pure bookkeeping: no tensors, no clock.

pub(crate) mod block_pool;
mod free_list;
pub(crate) mod prefix;
