//! What was used, what it costs, and where that is written down.
//!
//! `core` counts, `price` prices, `reprice` prices again, `row` is one line of the ledger, `settlement` is the promise that every admitted request ends in
//! exactly one such line, `ledger` keeps them. `feedback` is what clients said of the answers.

pub mod core;
pub mod feedback;
pub mod ledger;
pub mod price;
pub mod reprice;
pub mod row;
pub mod settlement;
