//! Times as people type them.

use clap::Args;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan, Zoned};

use crate::accounting::ledger::store::Period;

/// Days in one table: ten years and their leap days.
const DAYS_MAX: usize = 3_653;

/// A span of time that a command is asked for.
#[derive(Args, Clone)]
pub struct Between {
    /// Only requests that began at this time or later: 24h, 7d, 2026-11-01, 2026-11-01T14:30
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Only requests that began before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// The time zone of days and times, such as Europe/Berlin
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    pub zone: String,
}

/// The same, understood.
pub struct Times {
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    pub zone: TimeZone,
}

impl Between {
    /// # Errors
    /// What is no time or no zone, and a span that ends before it begins.
    pub fn read(&self, now: Timestamp) -> Result<Times, String> {
        let zone = zone(&self.zone)?;
        let read = |text: &Option<String>| text.as_ref().map(|text| time(text, &zone, now)).transpose();
        let (since, until) = (read(&self.since)?, read(&self.until)?);
        if since.zip(until).is_some_and(|(since, until)| since >= until) {
            return Err("--since is not before --until".to_owned());
        }
        Ok(Times { since, until, zone })
    }
}

/// A zone by its name in the tz database, such as `Europe/Berlin`.
pub fn zone(name: &str) -> Result<TimeZone, String> {
    TimeZone::get(name)
        .map_err(|_| format!("there is no time zone `{name}`; zones are called like Europe/Berlin or UTC"))
}

/// A point in time: `24h` or `7d` ago, a date, a date and time in the zone, or one with an offset of its own.
pub fn time(text: &str, zone: &TimeZone, now: Timestamp) -> Result<Timestamp, String> {
    let bad = || format!("`{text}` is no time; write 24h, 7d, 2026-11-01, 2026-11-01T14:30 or 2026-11-01T14:30:00Z");
    if let Some(span) = ago(text) {
        return now.to_zoned(zone.clone()).checked_sub(span).map(|then| then.timestamp()).map_err(|_| bad());
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let local: DateTime = text.parse().map_err(|_| bad())?;
    local.to_zoned(zone.clone()).map(|then| then.timestamp()).map_err(|_| bad())
}

fn ago(text: &str) -> Option<Span> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: i64 = number.parse().ok().filter(|number| (0..=1_000_000).contains(number))?;
    match unit {
        "m" => Some(number.minutes()),
        "h" => Some(number.hours()),
        "d" => Some(number.days()),
        _ => None,
    }
}

/// Nanoseconds since the Unix epoch.
pub fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(if time.as_nanosecond() < 0 { i64::MIN } else { i64::MAX })
}

/// The days of a zone that share any time with a span, cut to it.
pub fn days(first: Timestamp, past: Timestamp, zone: &TimeZone) -> Result<Vec<Period>, String> {
    let mut days = Vec::new();
    let mut at = first.to_zoned(zone.clone());
    while at.timestamp() < past {
        if days.len() == DAYS_MAX {
            return Err(format!("these are more than {DAYS_MAX} days; say a later --since or an earlier --until"));
        }
        let tomorrow = tomorrow(&at).map_err(|error| error.to_string())?;
        days.push(Period {
            name: at.date().to_string(),
            first_ns: nanoseconds(at.timestamp()),
            past_ns: nanoseconds(tomorrow.timestamp().min(past)),
        });
        at = tomorrow;
    }
    Ok(days)
}

/// When the next day begins: not everywhere at midnight, nor 24 hours later.
fn tomorrow(day: &Zoned) -> Result<Zoned, jiff::Error> {
    day.start_of_day()?.tomorrow()?.start_of_day()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn times_are_read_as_people_type_them() {
        let (berlin, now) = (zone("Europe/Berlin").unwrap(), at("2026-11-21T12:00:00Z"));
        for (text, meant) in [
            ("24h", "2026-11-20T12:00:00Z"),
            ("90m", "2026-11-21T10:30:00Z"),
            // Over the end of summer time: the same time of day.
            ("30d", "2026-10-22T11:00:00Z"),
            ("2026-11-01", "2026-10-31T23:00:00Z"),
            ("2026-07-01T14:30", "2026-07-01T12:30:00Z"),
            ("2026-07-01T14:30:00Z", "2026-07-01T14:30:00Z"),
        ] {
            assert_eq!(time(text, &berlin, now), Ok(at(meant)), "{text}");
        }
        for bad in ["", "h", "-1h", "yesterday", "2026-13-01", "99999999999d", "é"] {
            assert!(time(bad, &berlin, now).is_err(), "{bad}");
        }
        let asked = |since: &str, until: &str| {
            let [since, until] = [since, until].map(|text| Some(text.to_owned()));
            Between { since, until, zone: "UTC".into() }.read(now)
        };
        assert!(asked("2026-11-01", "2026-11-02").is_ok());
        assert!(asked("2026-11-02", "2026-11-02").is_err_and(|why| why.contains("--since is not before --until")));
        assert!(zone("Mars/Olympus").unwrap_err().contains("Europe/Berlin"));
    }

    #[test]
    fn days_are_as_long_as_they_are_where_they_are() {
        const HOUR: i64 = 3_600_000_000_000;
        let hours = |name: &str, first: &str, past: &str| -> Vec<(String, i64)> {
            let days = days(at(first), at(past), &zone(name).unwrap()).unwrap();
            assert!(days.windows(2).all(|pair| pair[0].past_ns == pair[1].first_ns), "no gap between days");
            days.into_iter().map(|day| (day.name, (day.past_ns - day.first_ns) / HOUR)).collect()
        };
        let named = |names: &[(&str, i64)]| -> Vec<(String, i64)> {
            names.iter().map(|(name, hours)| ((*name).to_owned(), *hours)).collect()
        };
        assert_eq!(
            hours("Europe/Berlin", "2026-03-27T23:00:00Z", "2026-03-30T08:00:00Z"),
            named(&[("2026-03-28", 24), ("2026-03-29", 23), ("2026-03-30", 10)])
        );
        assert_eq!(
            hours("Europe/Berlin", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
            named(&[("2026-10-25", 25)])
        );
        // Summer time begins at midnight there: the day begins at one.
        assert_eq!(
            hours("America/Asuncion", "2024-10-05T04:00:00Z", "2024-10-07T03:00:00Z"),
            named(&[("2024-10-05", 24), ("2024-10-06", 23)])
        );
        assert_eq!(hours("UTC", "2026-11-21T12:00:00Z", "2026-11-21T12:00:00Z"), []);
        assert!(days(at("1970-01-01T00:00:00Z"), at("2026-01-01T00:00:00Z"), &zone("UTC").unwrap()).is_err());
    }
}
