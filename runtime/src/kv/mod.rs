//! Who owns which block of the KV pool. Pure bookkeeping: no tensors, no clock.

pub(crate) mod block_pool;
