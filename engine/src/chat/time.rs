//! Just enough of a calendar for `strftime_now`.

use std::time::{SystemTime, UNIX_EPOCH};

/// A date and a time of day, without a time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CivilTime {
    /// Year, Gregorian.
    pub year: i32,
    /// Month, 1 to 12.
    pub month: u32,
    /// Day of the month, 1 to 31.
    pub day: u32,
    /// Hour, 0 to 23.
    pub hour: u32,
    /// Minute, 0 to 59.
    pub minute: u32,
    /// Second, 0 to 59.
    pub second: u32,
}

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
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

impl CivilTime {
    /// The present time in UTC; the standard library does not know the local time zone.
    pub fn now_utc() -> Self {
        let s = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        Self::from_unix(s as i64)
    }

    /// The time `seconds` after 1970-01-01T00:00:00 of the same clock. For a local time add its offset first.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days to year, month, day: H. Hinnant, "chrono-compatible low-level date algorithms". The era is 400
        // years, the year begins in March.
        let z = days + 719_468;
        let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        Self {
            year: (yoe + era * 400 + i64::from(month <= 2)) as i32,
            month: month as u32,
            day: (doy - (153 * mp + 2) / 5 + 1) as u32,
            hour: (rest / 3600) as u32,
            minute: (rest / 60 % 60) as u32,
            second: (rest % 60) as u32,
        }
    }

    /// Day of the year, 1 to 366.
    fn yearday(&self) -> u32 {
        const BEFORE: [u32; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0);
        BEFORE[self.month0()] + self.day + u32::from(leap && self.month > 2)
    }

    fn month0(&self) -> usize {
        (self.month.clamp(1, 12) - 1) as usize
    }

    /// Day of the week, 0 is Sunday (Sakamoto's method).
    fn weekday(&self) -> usize {
        const T: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let y = if self.month < 3 {
            self.year - 1
        } else {
            self.year
        };
        let d = y + y.div_euclid(4) - y.div_euclid(100)
            + y.div_euclid(400)
            + T[self.month0()]
            + self.day as i32;
        d.rem_euclid(7) as usize
    }

    /// Formats like C's `strftime` in the C locale. Directives it does not know are left as they are.
    pub(super) fn strftime(&self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next();
            // The GNU and BSD way of asking for numbers without leading zeros.
            let bare = directive == Some('-');
            if bare {
                directive = chars.next();
            }
            let Some(d) = directive else {
                out.push_str(if bare { "%-" } else { "%" });
                break;
            };
            let (n, width, fill) = match d {
                'Y' => (self.year.unsigned_abs(), 1, '0'),
                'C' => (self.year.unsigned_abs() / 100, 2, '0'),
                'y' => (self.year.unsigned_abs() % 100, 2, '0'),
                'm' => (self.month, 2, '0'),
                'd' => (self.day, 2, '0'),
                'e' => (self.day, 2, ' '),
                'H' => (self.hour, 2, '0'),
                'I' => ((self.hour + 11) % 12 + 1, 2, '0'),
                'M' => (self.minute, 2, '0'),
                'S' => (self.second, 2, '0'),
                'j' => (self.yearday(), 3, '0'),
                'f' => (0, 6, '0'),
                'w' => (self.weekday() as u32, 1, '0'),
                'u' => ((self.weekday() as u32 + 6) % 7 + 1, 1, '0'),
                _ => {
                    match d {
                        'B' => out.push_str(MONTHS[self.month0()]),
                        'b' | 'h' => out.push_str(&MONTHS[self.month0()][..3]),
                        'A' => out.push_str(DAYS[self.weekday()]),
                        'a' => out.push_str(&DAYS[self.weekday()][..3]),
                        'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
                        'F' => out.push_str(&self.strftime("%Y-%m-%d")),
                        'T' | 'X' => out.push_str(&self.strftime("%H:%M:%S")),
                        'R' => out.push_str(&self.strftime("%H:%M")),
                        'D' | 'x' => out.push_str(&self.strftime("%m/%d/%y")),
                        'c' => out.push_str(&self.strftime("%a %b %e %H:%M:%S %Y")),
                        'n' => out.push('\n'),
                        't' => out.push('\t'),
                        '%' => out.push('%'),
                        // A naive Python datetime has no time zone to show.
                        'z' | 'Z' => {}
                        _ => out.extend(['%', d]),
                    }
                    continue;
                }
            };
            let n = n.to_string();
            if !bare {
                out.extend(std::iter::repeat_n(
                    fill,
                    usize::saturating_sub(width, n.len()),
                ));
            }
            out.push_str(&n);
        }
        out
    }
}
