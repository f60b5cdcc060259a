//! What the two requests about buckets ask for.

use super::{Problem, Rules, Violation, fields::Fields, object};
use crate::destination::{Destination, Keys};

/// Longest text that may be a challenge, bytes: more than one has, so that any other is told what it
/// is, too.
const CHALLENGE: usize = 4096;

impl Rules {
    /// A destination to add, with the keys that came with it.
    pub fn read_ownership(
        &self,
        body: &[u8],
    ) -> Result<(Destination, Option<Keys>), Vec<Violation>> {
        let map = object(body)?;
        let mut fields = Fields::new(&map, "");
        let destination = self.destination(&mut fields);
        let violations = fields.done();
        destination.filter(|_| violations.is_empty()).ok_or(violations)
    }

    /// A destination to prove, and what is said to be in the challenge.
    pub fn read_validation(&self, body: &[u8]) -> Result<(Destination, String), Vec<Violation>> {
        let map = object(body)?;
        let mut fields = Fields::new(&map, "");
        let destination = self.destination(&mut fields);
        let challenge = fields.required_text("ownership_challenge", CHALLENGE).map(str::to_owned);
        let violations = fields.done();
        match (destination, challenge) {
            (Some((destination, _keys)), Some(challenge)) if violations.is_empty() => {
                Ok((destination, challenge))
            }
            _ => Err(violations),
        }
    }

    /// The field that every request about a destination has.
    pub(super) fn destination(
        &self,
        fields: &mut Fields<'_>,
    ) -> Option<(Destination, Option<Keys>)> {
        let uri = fields.required_text("destination_conf", 2048)?;
        match self.destinations.parse(uri) {
            Ok(found) => Some(found),
            Err(error) => {
                fields.violation(Problem::Destination, "destination_conf", error.to_string());
                None
            }
        }
    }
}
