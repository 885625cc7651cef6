//! Stop strings: finds them across token borders, and holds back text that may turn out to be the start of one.

#[derive(Debug)]
pub(crate) struct StopScanner {
    stops: Vec<String>,
    /// Text not yet let go: always a proper beginning of some stop string.
    held: String,
}

impl StopScanner {
    /// Empty stop strings are ignored.
    pub fn new(stops: Vec<String>) -> StopScanner {
        StopScanner { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Appends to `out` what is safe to show of `text`. True: a stop string is complete; `out` ends before it, and
    /// nothing may follow.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        self.held.push_str(text);
        // The stop string that is complete first ends the answer, as if text had come in letter by letter.
        let hits = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = hits.min() {
            out.push_str(&self.held[..at]);
            self.held.clear();
            return true;
        }
        let keep = self.stops.iter().map(|stop| open_end(&self.held, stop)).max().unwrap_or(0);
        let safe = self.held.len() - keep;
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// The answer ended otherwise: what was held back is ordinary text after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`, at most.
fn open_end(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().map(|(at, _)| at).skip(1);
    beginnings.filter(|&at| text.ends_with(&stop[..at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::StopScanner;
    use proptest::prelude::*;

    fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut scanner = StopScanner::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut out = String::new();
        for piece in pieces {
            if scanner.push(piece, &mut out) {
                return (out, true);
            }
        }
        scanner.finish(&mut out);
        (out, false)
    }

    #[test]
    fn a_stop_string_is_found_wherever_the_text_is_cut() {
        let text = "ab안녕END그리고 abENabEND x";
        for stops in [&["END"][..], &["녕END"], &["안녕", "END"], &["abENa", "EN"], &["nowhere"], &["", "그리"]] {
            let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let letters: Vec<&str> = borders.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let want = stream(stops, &letters);
            for &a in &borders {
                for &b in borders.iter().filter(|&&b| b >= a) {
                    assert_eq!(
                        stream(stops, &[&text[..a], &text[a..b], &text[b..]]),
                        want,
                        "{stops:?} cut at {a}, {b}"
                    );
                }
            }
        }
    }

    #[test]
    fn text_is_held_back_no_longer_than_needed() {
        let mut scanner = StopScanner::new(vec!["###".to_owned()]);
        let mut out = String::new();
        assert!(!scanner.push("a#", &mut out));
        assert_eq!(out, "a");
        assert!(!scanner.push("#b", &mut out));
        assert_eq!(out, "a##b");
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(text in "[ab가]{0,20}", stops in proptest::collection::vec("[ab가]{1,4}", 0..4), cut in 0usize..20) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let at = text.char_indices().map(|(at, _)| at).nth(cut).unwrap_or(text.len());
            let (out, stopped) = stream(&stops, &[&text[..at], &text[at..]]);
            let first = (0..=text.len())
                .filter(|&end| text.is_char_boundary(end))
                .find_map(|end| stops.iter().filter(|stop| text[..end].ends_with(**stop)).map(|stop| end - stop.len()).min());
            prop_assert_eq!(stopped, first.is_some());
            prop_assert_eq!(out, &text[..first.unwrap_or(text.len())]);
        }
    }
}
