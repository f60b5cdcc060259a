//! How long to wait before something is tried again.

use std::time::Duration;

use crate::id;

/// After the first failure. The store's client has tried a few times by then.
const FIRST: Duration = Duration::from_millis(500);

/// At most. A store that comes back is used within this time; one that stays away is asked twice a
/// minute.
const MOST: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    /// Doubles each time; half of it is left to chance, so that those who failed together do not come
    /// back together.
    pub(super) fn next(&mut self) -> Duration {
        let whole = self.0;
        self.0 = (whole * 2).min(MOST);
        let chance = f64::from(u32::from_be_bytes(id::random())) / f64::from(u32::MAX);
        whole.mul_f64(0.5 + chance / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_a_limit_and_no_two_are_the_same() {
        let (mut one, mut other) = (Backoff::new(), Backoff::new());
        let mut whole = FIRST;
        let mut same = 0;
        for _ in 0..12 {
            let wait = one.next();
            assert!((whole / 2..=whole).contains(&wait), "{wait:?}");
            same += usize::from(wait == other.next());
            whole = (whole * 2).min(MOST);
        }
        assert!(same < 3);
        assert_eq!(whole, MOST);
    }
}
