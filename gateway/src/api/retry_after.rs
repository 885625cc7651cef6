//! When a server wants to be asked again: `retry-after` in seconds or as a date (RFC 9110 §10.2.3), or `retry-after-ms`.

use std::time::Duration;

use http::HeaderMap;

/// Nobody means more than a day, whatever they say.
const SECONDS_MAX: f64 = 86_400.0;

/// How long to wait from now; `None` if nothing that can be meant was said. A date that has passed is no wait.
pub fn read(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let millis = text("retry-after-ms").and_then(|millis| millis.parse::<f64>().ok()).map(|millis| millis / 1e3);
    let seconds = millis.or_else(|| {
        let text = text("retry-after")?;
        text.parse::<f64>().ok().or_else(|| until(text))
    })?;
    (seconds.is_finite() && seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(SECONDS_MAX)))
}

fn until(date: &str) -> Option<f64> {
    let format = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let at = time::PrimitiveDateTime::parse(date, &format).ok()?.assume_utc();
    Some((at - time::OffsetDateTime::now_utc()).as_seconds_f64().max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_milliseconds_and_dates_are_read_and_nothing_absurd_is() {
        let of = |name: &'static str, value: &str| {
            read(&HeaderMap::from_iter([(http::HeaderName::from_static(name), value.parse().unwrap())]))
        };
        assert_eq!(of("retry-after", "7"), Some(Duration::from_secs(7)));
        assert_eq!(of("retry-after-ms", "250"), Some(Duration::from_millis(250)));
        assert_eq!(of("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        for endless in ["1e300", "86401", "Fri, 31 Dec 2100 23:59:59 GMT"] {
            assert_eq!(of("retry-after", endless), Some(Duration::from_secs(86_400)), "{endless}");
        }
        for absurd in ["-1", "NaN", "inf", "soon", ""] {
            assert_eq!(of("retry-after", absurd), None, "{absurd}");
        }
    }
}
