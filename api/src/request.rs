//! What a create request asks for, or everything that is wrong with it.

mod fields;
mod ownership;

use std::{net::IpAddr, str::FromStr as _, sync::Arc};

use capture_user::filter::{Filter, FilterError, Prefix, Protocol};
use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::fields::{Fields, cut};
use crate::{
    colo::Colo,
    destination::{Destination, Destinations},
    record::now_us,
};

/// How far back `offset_time` may be, microseconds.
const LONGEST_AGO_US: i64 = 24 * 3_600_000_000;

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The body is not what it must be as a whole.
    Body,
    /// A field is not there.
    Missing,
    /// A field has a value of another type.
    Type,
    /// A field's value cannot be.
    Value,
    /// There is no such field.
    Unknown,
    /// Fields contradict each other.
    Contradiction,
    /// No host is called that.
    Colo,
    /// Nothing can be written there.
    Destination,
}

/// One thing that is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What kind of thing.
    pub problem: Problem,
    /// What a person can do about it.
    pub message: String,
    /// JSON pointer to the field.
    pub pointer: String,
}

/// A filter as the API has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FilterV1 {
    /// Source address or network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "1.2.3.4")]
    pub source_address: Option<String>,
    /// Source port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 123)]
    pub source_port: Option<u16>,
    /// Destination address or network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "1.2.3.4")]
    pub destination_address: Option<String>,
    /// Destination port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 80)]
    pub destination_port: Option<u16>,
    /// IP protocol number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 6)]
    pub protocol: Option<u8>,
}

impl FilterV1 {
    /// What the engine makes of it.
    pub fn filter(&self) -> Result<Filter, FilterError> {
        let prefix = |text: &Option<String>| text.as_deref().map(prefix).transpose();
        Ok(Filter {
            src: prefix(&self.source_address)?,
            dst: prefix(&self.destination_address)?,
            sport: self.source_port,
            dport: self.destination_port,
            protocol: self.protocol.map(Protocol),
        })
    }
}

/// A capture that can be, of either kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Packets to come.
    Full(Box<FullRequest>),
    /// Packets that passed.
    Simple(SimpleRequest),
}

/// A full capture that can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullRequest {
    /// Which packets, as asked.
    pub filter_v1: FilterV1,
    /// Which packets.
    pub filter: Filter,
    /// The site, as asked.
    pub colo_name: String,
    /// Where its files go.
    pub destination: Destination,
    /// Seconds.
    pub time_limit: u32,
    /// Packets.
    pub packet_limit: Option<u32>,
    /// Bytes.
    pub byte_limit: Option<u64>,
}

/// A simple capture that can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimpleRequest {
    /// Which packets, as asked.
    pub filter_v1: FilterV1,
    /// The end of the time that is asked for, UTC microseconds.
    pub offset_us: i64,
    /// Seconds before that.
    pub time_limit: u32,
    /// Packets.
    pub packet_limit: u32,
}

/// What requests are held against.
#[derive(Clone, Debug)]
pub struct Rules {
    /// This host's names.
    pub colo: Colo,
    /// What destinations there can be.
    pub destinations: Arc<Destinations>,
}

impl Rules {
    /// Reads the body of a create request. Everything that is wrong with it is found at once.
    pub fn read(&self, body: &[u8]) -> Result<Request, Vec<Violation>> {
        let map = object(body)?;
        let mut fields = Fields::new(&map, "");
        let kind = fields.choice("type", &["simple", "full"]);
        fields.choice("system", &["magic-transit"]);
        match kind {
            Some("simple") => simple(fields, now_us()).map(Request::Simple),
            // What else is wrong cannot be told without the type; the filter can.
            None => {
                filter(&mut fields);
                Err(fields.violations())
            }
            Some(_) => self.full(fields).map(|request| Request::Full(Box::new(request))),
        }
    }

    fn full(&self, mut fields: Fields<'_>) -> Result<FullRequest, Vec<Violation>> {
        let time_limit = fields.required_number("time_limit", 1, 86400);
        let packet_limit = fields.number("packet_limit", 1, 10_000);
        let byte_limit = fields.number("byte_limit", 1, 1_000_000_000);
        let filter = filter(&mut fields);
        // The product's documentation has `colo`, its clients `colo_name`.
        let key = if fields.has("colo_name") { "colo_name" } else { "colo" };
        let colo_name = if fields.has(key) {
            fields.text(key, 64)
        } else {
            fields.missing("colo_name");
            None
        };
        if fields.has("colo_name") && fields.has("colo") {
            fields.text("colo", 64);
            fields.violation(
                Problem::Contradiction,
                "colo",
                "`colo` is another name of `colo_name`: give one of them",
            );
        }
        if let Some(name) = colo_name
            && !self.colo.answers_to(name)
        {
            let known: Vec<_> = self.colo.known().collect();
            let message = format!("no host answers to `{name}`; known are {}", known.join(", "));
            fields.violation(Problem::Colo, key, message);
        }
        // Its keys are those that it was added with.
        let destination = self.destination(&mut fields).map(|(destination, _keys)| destination);
        let violations = fields.done();
        let all = (time_limit, filter, colo_name, destination);
        match all {
            (Some(time_limit), Some((filter_v1, filter)), Some(colo_name), Some(destination))
                if violations.is_empty() =>
            {
                Ok(FullRequest {
                    filter_v1,
                    filter,
                    colo_name: colo_name.to_owned(),
                    destination,
                    time_limit: time_limit as u32,
                    packet_limit: packet_limit.map(|limit| limit as u32),
                    byte_limit,
                })
            }
            _ => Err(violations),
        }
    }
}

/// The object that a body must be.
fn object(body: &[u8]) -> Result<Map<String, Value>, Vec<Violation>> {
    let whole = |message: String| {
        vec![Violation { problem: Problem::Body, message, pointer: String::new() }]
    };
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(whole("the body must be a JSON object".into())),
        Err(error) => Err(whole(format!("the body is not JSON: {error}"))),
    }
}

fn simple(mut fields: Fields<'_>, now_us: i64) -> Result<SimpleRequest, Vec<Violation>> {
    let time_limit = fields.required_number("time_limit", 1, 300);
    let packet_limit = fields.required_number("packet_limit", 1, 10_000);
    let filter = filter(&mut fields);
    let offset_us = offset(&mut fields, now_us);
    let violations = fields.done();
    match (time_limit, packet_limit, filter, offset_us) {
        (Some(time_limit), Some(packet_limit), Some((filter_v1, _)), Some(offset_us))
            if violations.is_empty() =>
        {
            Ok(SimpleRequest {
                filter_v1,
                offset_us,
                time_limit: time_limit as u32,
                packet_limit: packet_limit as u32,
            })
        }
        _ => Err(violations),
    }
}

/// The time that a simple capture looks back from, UTC microseconds: without one, now.
fn offset(fields: &mut Fields<'_>, now_us: i64) -> Option<i64> {
    const KEY: &str = "offset_time";
    if !fields.has(KEY) {
        // It is known all the same.
        fields.text(KEY, 64);
        return Some(now_us);
    }
    let text = fields.text(KEY, 64)?;
    if text.is_empty() {
        return Some(now_us);
    }
    let time = Timestamp::from_str(text).or_else(|_| {
        DateTime::from_str(text)
            .and_then(|time| time.to_zoned(TimeZone::UTC))
            .map(|time| time.timestamp())
    });
    let Ok(time) = time else {
        let message = format!(
            "`{KEY}` is `{}`, but must be a time such as 2026-01-01T08:00:00Z; one without a zone is UTC",
            cut(text)
        );
        fields.violation(Problem::Value, KEY, message);
        return None;
    };
    let oldest_us = now_us - LONGEST_AGO_US;
    if !(oldest_us..=now_us).contains(&time.as_microsecond()) {
        let message = format!(
            "`{KEY}` is {time}, but must lie within the last 24 hours: from {} to {}",
            crate::record::time(oldest_us),
            crate::record::time(now_us)
        );
        fields.violation(Problem::Value, KEY, message);
        return None;
    }
    Some(time.as_microsecond())
}

fn filter(fields: &mut Fields<'_>) -> Option<(FilterV1, Filter)> {
    let empty = Map::new();
    let map = fields.object("filter_v1").unwrap_or(&empty);
    let mut inner = Fields::new(map, "/filter_v1");
    let src = address(&mut inner, "source_address");
    let dst = address(&mut inner, "destination_address");
    let sport = inner.number("source_port", 0, 65535).map(|port| port as u16);
    let dport = inner.number("destination_port", 0, 65535).map(|port| port as u16);
    let protocol = inner.number("protocol", 0, 255).map(|number| number as u8);
    let filter = Filter { src, dst, sport, dport, protocol: protocol.map(Protocol) };
    if let Err(error) = filter.check() {
        let pointer = match error {
            FilterError::Families { .. } => "destination_address",
            _ => "protocol",
        };
        inner.violation(Problem::Contradiction, pointer, error.to_string());
    }
    let text = |key| map.get(key).and_then(Value::as_str).map(str::to_owned);
    let filter_v1 = FilterV1 {
        source_address: text("source_address"),
        source_port: sport,
        destination_address: text("destination_address"),
        destination_port: dport,
        protocol,
    };
    let violations = inner.done();
    let fine = violations.is_empty();
    fields.extend(violations);
    fine.then_some((filter_v1, filter))
}

fn address(fields: &mut Fields<'_>, key: &'static str) -> Option<Prefix> {
    let text = fields.text(key, 64)?;
    match prefix(text) {
        Ok(prefix) => Some(prefix),
        Err(error) => {
            fields.violation(Problem::Value, key, error.to_string());
            None
        }
    }
}

/// Reads an address or network. A zone means something on one host only, and is none.
fn prefix(text: &str) -> Result<Prefix, FilterError> {
    let prefix = text.parse::<Prefix>()?;
    Ok(match prefix.address() {
        // What is on the wire is IPv4.
        IpAddr::V6(v6) if prefix.length() >= 96 => v6
            .to_ipv4_mapped()
            .and_then(|v4| Prefix::new(v4.into(), prefix.length() - 96))
            .unwrap_or(prefix),
        _ => prefix,
    })
}

#[cfg(test)]
mod tests;
