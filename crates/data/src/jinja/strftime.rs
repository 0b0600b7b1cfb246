//! `strftime_now`: today's date and time, in the C locale.

use super::{Error, Result};
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A moment, taken apart.
struct LocalTime {
    year: u64,
    month: u64,
    day: u64,
    /// Counted from 1.
    day_of_year: u64,
    /// Counted from Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
    micros: u32,
    unix_secs: u64,
}

/// Now in UTC. (Python's is local, but a training file should not depend on the place where it is read.)
pub(super) fn now(format: &str) -> Result<String> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|problem| Error::new(problem.to_string()))?;
    strftime(&LocalTime::of(now.as_secs(), now.subsec_micros()), format)
}

impl LocalTime {
    fn of(unix_secs: u64, micros: u32) -> Self {
        let (days, secs) = (unix_secs / 86_400, unix_secs % 86_400);
        let (year, month, day) = civil_date(days);
        let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap_day = u64::from(is_leap && month > 2);
        Self {
            year,
            month,
            day,
            day_of_year: before[(month - 1) as usize % 12] + leap_day + day,
            weekday: (days + 4) % 7,
            hour: secs / 3600,
            minute: secs / 60 % 60,
            second: secs % 60,
            micros,
            unix_secs,
        }
    }

    /// Year and week of ISO 8601: a week belongs to the year that has its Thursday.
    fn iso_week(&self) -> (u64, u64) {
        let days = self.unix_secs / 86_400;
        let from_monday = (self.weekday + 6) % 7;
        let thursday = Self::of((days + 3 - from_monday) * 86_400, 0);
        (thursday.year, (thursday.day_of_year - 1) / 7 + 1)
    }
}

/// A date by a format, with glibc's flags: `-` for no padding, `_` for spaces, `0` for zeros, `^` for capitals.
fn strftime(moment: &LocalTime, format: &str) -> Result<String> {
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let (mut pad, mut capitals) = (None, false);
        while let Some(flag) = chars.next_if(|char| "-_0^".contains(*char)) {
            match flag {
                '^' => capitals = true,
                flag => pad = Some(flag),
            }
        }
        let directive = chars.next();
        let text = match directive.and_then(|directive| number(moment, directive)) {
            Some((number, width, default)) => match pad.unwrap_or(default) {
                '-' => number.to_string(),
                '_' => format!("{number:width$}"),
                _ => format!("{number:0width$}"),
            },
            None => words(moment, directive)?,
        };
        match capitals {
            true => out.push_str(&text.to_uppercase()),
            false => out.push_str(&text),
        }
    }
    Ok(out)
}

/// The number of a directive, its width, and its padding.
fn number(moment: &LocalTime, directive: char) -> Option<(u64, usize, char)> {
    let hour_of_12 = (moment.hour + 11) % 12 + 1;
    let from_monday = (moment.weekday + 6) % 7;
    let week_of = |weekday: u64| (moment.day_of_year + 6 - weekday) / 7;
    Some(match directive {
        'Y' => (moment.year, 4, '0'),
        'y' => (moment.year % 100, 2, '0'),
        'C' => (moment.year / 100, 2, '0'),
        'm' => (moment.month, 2, '0'),
        'd' => (moment.day, 2, '0'),
        'e' => (moment.day, 2, '_'),
        'j' => (moment.day_of_year, 3, '0'),
        'H' => (moment.hour, 2, '0'),
        'k' => (moment.hour, 2, '_'),
        'I' => (hour_of_12, 2, '0'),
        'l' => (hour_of_12, 2, '_'),
        'M' => (moment.minute, 2, '0'),
        'S' => (moment.second, 2, '0'),
        'f' => (u64::from(moment.micros), 6, '0'),
        's' => (moment.unix_secs, 1, '0'),
        'w' => (moment.weekday, 1, '0'),
        'u' => (from_monday + 1, 1, '0'),
        'U' => (week_of(moment.weekday), 2, '0'),
        'W' => (week_of(from_monday), 2, '0'),
        'V' => (moment.iso_week().1, 2, '0'),
        'G' => (moment.iso_week().0, 4, '0'),
        'g' => (moment.iso_week().0 % 100, 2, '0'),
        _ => return None,
    })
}

/// The text of a directive that is no number.
fn words(moment: &LocalTime, directive: Option<char>) -> Result<String> {
    let month = MONTHS[(moment.month - 1) as usize % 12];
    let weekday = WEEKDAYS[moment.weekday as usize % 7];
    let half = if moment.hour < 12 { "AM" } else { "PM" };
    let several = match directive {
        Some('B') => return Ok(month.to_owned()),
        Some('b' | 'h') => return Ok(month[..3].to_owned()),
        Some('A') => return Ok(weekday.to_owned()),
        Some('a') => return Ok(weekday[..3].to_owned()),
        Some('p') => return Ok(half.to_owned()),
        Some('P') => return Ok(half.to_lowercase()),
        Some('n') => return Ok("\n".to_owned()),
        Some('t') => return Ok("\t".to_owned()),
        Some('%') => return Ok("%".to_owned()),
        // Python's date knows no time zone.
        Some('z' | 'Z') => return Ok(String::new()),
        Some('F') => "%Y-%m-%d",
        Some('D' | 'x') => "%m/%d/%y",
        Some('T' | 'X') => "%H:%M:%S",
        Some('R') => "%H:%M",
        Some('r') => "%I:%M:%S %p",
        Some('c') => "%a %b %e %H:%M:%S %Y",
        other => {
            return Err(Error::new(format!(
                "strftime_now: unknown directive %{}",
                other.unwrap_or(' ')
            )));
        }
    };
    strftime(moment, several)
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // days since 0000-03-01
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |secs, expected: &str| {
            assert_eq!(
                strftime(
                    &LocalTime::of(secs, 0),
                    "%a %A %e %d %b %B %m %y %Y %H:%M:%S %I%p %F %%"
                )
                .unwrap(),
                expected
            );
        };
        check(
            0,
            "Thu Thursday  1 01 Jan January 01 70 1970 00:00:00 12AM 1970-01-01 %",
        );
        check(
            1_709_210_096,
            "Thu Thursday 29 29 Feb February 02 24 2024 12:34:56 12PM 2024-02-29 %",
        );
        check(
            4_102_444_799,
            "Thu Thursday 31 31 Dec December 12 99 2099 23:59:59 11PM 2099-12-31 %",
        );
    }

    #[test]
    fn flags_and_weeks_are_those_of_glibc() {
        let check = |secs, format: &str, expected: &str| {
            assert_eq!(
                strftime(&LocalTime::of(secs, 42), format).unwrap(),
                expected
            );
        };
        check(
            0,
            "%-d/%-m/%_d %^b %j %-j %u %w %f %c",
            "1/1/ 1 JAN 001 1 4 4 000042 Thu Jan  1 00:00:00 1970",
        );
        check(
            1_709_210_096,
            "%j %U %W %V %G %-I %P%n%D",
            "060 08 09 09 2024 12 pm\n02/29/24",
        );
        check(1_609_459_200, "%G-W%V %U %W", "2020-W53 00 00");
        assert!(strftime(&LocalTime::of(0, 0), "%Q").is_err());
        assert!(strftime(&LocalTime::of(0, 0), "%").is_err());
    }
}
