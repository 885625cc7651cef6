//! The layout of one step: a flat run of new tokens over several sequences, without padding and without masks.

/// Tokens in a KV block. 32 also suits the paged kernels of other devices.
pub(crate) const BLOCK_TOKENS: usize = 32;

/// T new tokens over S sequences, R of which need logits.
#[derive(Debug, Default)]
pub(crate) struct StepBatch {
    /// `[T]` token ids, all below the vocabulary size.
    pub ids: Vec<u32>,
    /// `[T]` position of each token in its sequence.
    pub pos: Vec<u32>,
    /// `[T]` where its key and value go: block · BLOCK_TOKENS + offset.
    pub slot: Vec<u32>,
    /// `[T]` which sequence each token belongs to, below S.
    pub seq: Vec<u32>,
    /// `[S + 1]` where each sequence's blocks begin in `tables`.
    pub table_start: Vec<u32>,
    /// Block numbers, sequence after sequence, in token order.
    pub tables: Vec<u32>,
    /// `[R]` rows whose logits are wanted.
    pub sel: Vec<u32>,
}

impl StepBatch {
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The blocks of the sequence that row `t` belongs to. Row `t` attends to keys `0..=pos[t]` of them.
    pub fn table_of(&self, t: usize) -> &[u32] {
        let seq = self.seq[t] as usize;
        &self.tables[self.table_start[seq] as usize..self.table_start[seq + 1] as usize]
    }

    /// Appends one sequence's next tokens: `ids` at positions `first..`, with `table` as its blocks. With `sample` the
    /// last of them gets logits.
    pub fn push(&mut self, ids: &[u32], first: usize, table: &[u32], sample: bool) {
        if self.table_start.is_empty() {
            self.table_start.push(0);
        }
        let seq = (self.table_start.len() - 1) as u32;
        for (i, &id) in ids.iter().enumerate() {
            let at = first + i;
            self.ids.push(id);
            self.pos.push(at as u32);
            self.seq.push(seq);
            self.slot.push(table[at / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (at % BLOCK_TOKENS) as u32);
        }
        self.tables.extend_from_slice(table);
        self.table_start.push(self.tables.len() as u32);
        if sample {
            self.sel.push(self.ids.len() as u32 - 1);
        }
    }
    /// Asks for the logits of the last `rows` tokens that were appended.
    pub fn select_last(&mut self, rows: usize) {
        let end = self.ids.len() as u32;
        self.sel.extend(end - rows as u32..end);
    }
}
