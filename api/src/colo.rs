//! Which site this host is, and whether a capture is meant for it.

use crate::config::Config;

/// This host's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Colo {
    name: String,
    region: String,
}

impl Colo {
    /// As configured.
    pub fn new(config: &Config) -> Self {
        let region = if config.region.is_empty() {
            config.colo.trim_end_matches(|c: char| c.is_ascii_digit()).to_ascii_uppercase()
        } else {
            config.region.clone()
        };
        Self { name: config.colo.clone(), region }
    }

    /// The site.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether `colo_name` means this host.
    pub fn answers_to(&self, colo_name: &str) -> bool {
        self.known().any(|known| known.eq_ignore_ascii_case(colo_name))
    }

    /// Every name that a capture may give.
    pub fn known(&self) -> impl Iterator<Item = &str> {
        // A site without digits is its own region.
        let region = Some(self.region.as_str());
        let other =
            region.filter(|region| !region.is_empty() && !region.eq_ignore_ascii_case(&self.name));
        [self.name.as_str()].into_iter().chain(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn colo(colo: &str, region: &str) -> Colo {
        Colo::new(&Config { colo: colo.into(), region: region.into(), ..Config::default() })
    }

    #[test]
    fn a_host_answers_to_its_colo_and_its_region_in_any_case() {
        let ord = colo("ord02", "");
        for name in ["ord02", "ORD02", "ord", "ORD", "Ord"] {
            assert!(ord.answers_to(name), "{name}");
        }
        for name in ["", "ord01", "or", "ams", "ord02 "] {
            assert!(!ord.answers_to(name), "{name}");
        }
        assert_eq!(ord.known().collect::<Vec<_>>(), ["ord02", "ORD"]);
    }

    #[test]
    fn a_region_can_be_given_and_a_colo_of_digits_has_none() {
        assert!(colo("rack7", "EU-West").answers_to("eu-west"));
        assert_eq!(colo("007", "").known().collect::<Vec<_>>(), ["007"]);
        assert_eq!(colo("lab", "").known().collect::<Vec<_>>(), ["lab"]);
    }
}
