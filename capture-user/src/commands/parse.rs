//! Values on the command line.

use std::{fmt::Display, str::FromStr, time::Duration};

/// Reads a whole number; when it is none, or not in range, the error says what would be.
pub(super) fn whole<T>(least: T, most: T) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: FromStr + PartialOrd + Display + Copy,
{
    move |text| match text.parse() {
        Ok(number) if least <= number && number <= most => Ok(number),
        _ => Err(format!("give a whole number from {least} to {most}")),
    }
}

/// Bytes with an optional unit of powers of 1024.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u64 = match &lower[digits.len()..] {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err("give a whole number of bytes, or one with K, M, G or T".into()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_error| "give a whole number of bytes, or one with K, M, G or T")?;
    match number.checked_mul(factor) {
        Some(0) => Err("must be at least 1 byte".into()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("must be at most {} bytes", u64::MAX)),
    }
}

/// A duration of at least a millisecond and at most a year.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    const YEAR: Duration = Duration::from_hours(365 * 24);
    let limit = "give a time with a unit, from 1ms to 365days: 500ms, 30s, 5m, 2h";
    let duration = text
        .parse::<u64>()
        .map(Duration::from_secs)
        .or_else(|_| humantime::parse_duration(text))
        .map_err(|_error| limit)?;
    if duration < Duration::from_millis(1) || duration > YEAR {
        return Err(limit.into());
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_units_and_refused_with_the_limit() {
        assert_eq!(bytes("500000"), Ok(500_000));
        assert_eq!(bytes("64K"), Ok(65_536));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("0"), Err("must be at least 1 byte".into()));
        assert!(bytes("1.5M").is_err() && bytes("").is_err() && bytes("M").is_err());
        assert!(bytes("99999999999999999999").is_err() && bytes("99999999T").is_err());
    }

    #[test]
    fn durations_are_read_with_units_and_refused_with_the_limit() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert!(duration("0s").is_err() && duration("400days").is_err() && duration("x").is_err());
    }
}
