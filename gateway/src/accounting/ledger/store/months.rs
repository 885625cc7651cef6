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
        Month::at(made_ns(request_id)?)
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

    /// So many months earlier.
    pub fn before(self, months: u32) -> Month {
        let count = (self.year * 12 + i32::from(self.month) - 1).saturating_sub_unsigned(months);
        Month { year: count.div_euclid(12), month: count.rem_euclid(12) as u8 + 1 }
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

impl std::str::FromStr for Month {
    type Err = ();

    fn from_str(text: &str) -> Result<Month, ()> {
        let (year, month) = text.split_once('_').ok_or(())?;
        let (year, month) = (year.parse().map_err(drop)?, month.parse().map_err(drop)?);
        if (1..=12).contains(&month) { Ok(Month { year, month }) } else { Err(()) }
    }
}

/// The millisecond in which a request's id was made, as a Unix nanosecond; `None` if it is not of our making.
pub fn made_ns(request_id: &str) -> Option<i64> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if request_id.len() != ID_DIGITS || !request_id.bytes().all(is_digit) {
        return None;
    }
    i64::from_str_radix(&request_id[..TIME_DIGITS], 16).ok()?.checked_mul(1_000_000)
}

/// The first nanosecond at which rows with ids from here on are surely all of them: a request's later attempts begin later
/// than its id was made, by a day at the most.
pub fn whole_from_ns(first_id: &str) -> i64 {
    const DAY_NS: i64 = 24 * 3_600_000_000_000;
    let milliseconds = first_id.get(..TIME_DIGITS).and_then(|digits| i64::from_str_radix(digits, 16).ok());
    milliseconds.map_or(i64::MIN, |first| first.saturating_mul(1_000_000).saturating_add(DAY_NS))
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
        assert_eq!((november.to_string(), "2026_11".parse()), ("2026_11".to_owned(), Ok(november)));
        assert_eq!(november.before(13), Month { year: 2025, month: 10 });
        assert_eq!(november.before(11).before(1), Month { year: 2025, month: 11 });
        assert_eq!(whole_from_ns(&november.first_id()), november.first_ns() + 24 * 3_600_000_000_000);
        for foreign in ["", "r1", "0193A1B2C3D47abc8def0123456789ab", "é193a1b2c3d47abc8def0123456789a"] {
            assert_eq!(Month::of(foreign), None, "{foreign}");
        }
    }
}
