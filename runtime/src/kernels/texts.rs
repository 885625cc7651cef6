//! The layout of a batch of whole texts: a flat run of tokens, text after text, without padding and without masks.

/// T tokens of S texts.
#[derive(Debug)]
pub(crate) struct TextBatch {
    /// `[T]` token ids.
    pub ids: Vec<u32>,
    /// `[S + 1]` where each text begins in `ids`, and the end.
    pub starts: Vec<usize>,
}

impl TextBatch {
    pub fn new<'t>(texts: impl IntoIterator<Item = &'t [u32]>) -> TextBatch {
        let mut batch = TextBatch { ids: Vec::new(), starts: vec![0] };
        for text in texts {
            batch.ids.extend_from_slice(text);
            batch.starts.push(batch.ids.len());
        }
        batch
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn texts(&self) -> usize {
        self.starts.len() - 1
    }

    /// `[T]` the place of each token in its text.
    pub fn positions(&self) -> impl Iterator<Item = u32> {
        self.starts.windows(2).flat_map(|text| 0..(text[1] - text[0]) as u32)
    }
}
