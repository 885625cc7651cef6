//! Mistakes that tests make the bookkeeping commit, to see that the simulation notices. Without tests they are not there.

#[cfg(not(test))]
macro_rules! seeded {
    ($fault:ident) => {
        false
    };
}

#[cfg(test)]
macro_rules! seeded {
    ($fault:ident) => {
        crate::fault::is_on(crate::fault::Fault::$fault)
    };
}

#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A cancelled sequence keeps its blocks.
    LeakOnCancel,
    /// A block is free though somebody still owns it.
    FreedWhileShared,
    /// A block that is used again is still found by what it held.
    StaleHash,
    /// The salt is not part of what a block is known by.
    SaltForgotten,
    /// A prompt may be found in the cache to its last token, and then nothing is left to compute.
    WholePromptFound,
    /// Choices of one prompt write into one block.
    ForkWithoutCopy,
    /// A cancelled request stays in the queue.
    CancelLostInQueue,
    /// A cancelled choice that waits for its prompt begins all the same.
    CancelLostInFork,
    /// Batch requests are never admitted.
    ClassForgotten,
    /// Sampled tokens are free.
    OutputNotCharged,
    /// Requests that fit pass one that does not, for ever.
    HeadPassedForEver,
    /// A sequence may lose its blocks before they were of any use.
    PreemptedWithoutProgress,
    /// A deadline passes in the queue and nothing happens.
    DeadlineIgnored,
    /// Decoding does not count against the step's tokens.
    DecodeOutsideBudget,
    /// A shadow shares a step with users.
    ShadowBesideUsers,
    /// A preempted sequence is forgotten.
    PreemptedForgotten,
    /// A sequence is admitted to a step that has no time for it.
    AdmittedWithoutTime,
    /// Choices are believed to have a token when the first of them has one.
    ForksFollowTheFirst,
    /// Requests are served in the order of submission once they waited for long.
    FloodServedFirst,
    /// Who has something running saves up whatever it has no need of.
    CreditWithoutEnd,
    /// What was found in the cache is charged like what was computed.
    CachedTokensCharged,
}

#[cfg(test)]
impl Fault {
    pub const ALL: [Fault; 21] = [
        Fault::LeakOnCancel,
        Fault::FreedWhileShared,
        Fault::StaleHash,
        Fault::SaltForgotten,
        Fault::WholePromptFound,
        Fault::ForkWithoutCopy,
        Fault::CancelLostInQueue,
        Fault::CancelLostInFork,
        Fault::ClassForgotten,
        Fault::OutputNotCharged,
        Fault::HeadPassedForEver,
        Fault::PreemptedWithoutProgress,
        Fault::DeadlineIgnored,
        Fault::DecodeOutsideBudget,
        Fault::ShadowBesideUsers,
        Fault::PreemptedForgotten,
        Fault::AdmittedWithoutTime,
        Fault::ForksFollowTheFirst,
        Fault::FloodServedFirst,
        Fault::CreditWithoutEnd,
        Fault::CachedTokensCharged,
    ];
}

#[cfg(test)]
thread_local! {
    static FAULT: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Makes this thread's bookkeeping wrong in one way.
#[cfg(test)]
pub(crate) fn seed(fault: Option<Fault>) {
    FAULT.set(fault);
}

#[cfg(test)]
pub(crate) fn is_on(fault: Fault) -> bool {
    FAULT.get() == Some(fault)
}
