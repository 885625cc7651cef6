//! Months of requests: what rows are kept and dropped by. A request's id begins with the time at which it was made, to the
//! millisecond (UUIDv7), so that the id alone says whose month it is, and stays unique over all of them.

use time::{Date, Month as Name, OffsetDateTime};

/// Hexadecimal digits of an id that are its time.
const TIME_DIGITS: usize = 12;
const ID_DIGITS: usize = 32;

/// A month, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month {
    year: i32,
    /// 1 to 12.
    month: u8,
}

impl Month {
    /// Of a request id; `None` if it is not of our making.
    pub fn of(request_id: &str) -> Option<Month> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if request_id.len() != ID_DIGITS || !request_id.bytes().all(is_digit) {
            return None;
        }
        let milliseconds = i64::from_str_radix(&request_id[..TIME_DIGITS], 16).ok()?;
        Month::at(milliseconds.checked_mul(1_000_000)?)
    }

    /// At a Unix nanosecond.
    pub fn at(ns: i64) -> Option<Month> {
        let time = OffsetDateTime::from_unix_timestamp(ns.div_euclid(1_000_000_000)).ok()?;
        Some(Month { year: time.year(), month: time.month().into() })
    }

    pub fn next(self) -> Month {
        match self.month {
            12 => Month { year: self.year + 1, month: 1 },
            month => Month { year: self.year, month: month + 1 },
        }
    }

    /// How ids begin that are of this month or later.
    pub fn first_id(self) -> String {
        format!("{:012x}", self.first_ns().div_euclid(1_000_000).max(0))
    }

    /// Its first Unix nanosecond.
    pub fn first_ns(self) -> i64 {
        let first = Name::try_from(self.month).and_then(|month| Date::from_calendar_date(self.year, month, 1));
        first.map_or(0, |first| first.midnight().assume_utc().unix_timestamp().saturating_mul(1_000_000_000))
    }
}

/// As in names of tables.
impl std::fmt::Display for Month {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}_{:02}", self.year, self.month)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_tells_its_month_and_ids_of_a_month_lie_between_its_bounds() {
        let november = Month { year: 2026, month: 11 };
        for (ns, month) in [
            (november.first_ns(), november),
            (november.next().first_ns() - 1, november),
            (november.first_ns() - 1, Month { year: 2026, month: 10 }),
        ] {
            let id = format!("{:012x}7abc8def0123456789ab", ns / 1_000_000);
            assert_eq!(Month::of(&id), Some(month));
            assert!((month.first_id()..month.next().first_id()).contains(&id), "{id}");
        }
        assert_eq!(
            (november.to_string().as_str(), november.next().next().to_string().as_str()),
            ("2026_11", "2027_01")
        );
        for foreign in ["", "r1", "0193A1B2C3D47abc8def0123456789ab", "é193a1b2c3d47abc8def0123456789a"] {
            assert_eq!(Month::of(foreign), None, "{foreign}");
        }
    }
}
