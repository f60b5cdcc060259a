//! The flags of a filter, which several commands have.

use super::parse::whole;
use crate::filter::{Filter, FilterError, Prefix, Protocol};

/// Which packets.
#[derive(Clone, Copy, Debug, clap::Args)]
#[expect(clippy::doc_markdown, reason = "it is the help text, not Markdown")]
pub struct FilterArgs {
    /// Source address or network: 192.0.2.1, 10.0.0.0/8, 2001:db8::/32
    #[arg(long, value_name = "ADDR[/LEN]", help_heading = "Filter")]
    pub src: Option<Prefix>,

    /// Destination address or network
    #[arg(long, value_name = "ADDR[/LEN]", help_heading = "Filter")]
    pub dst: Option<Prefix>,

    /// Source port, 0 to 65535
    #[arg(
        long, value_name = "PORT", value_parser = whole::<u16>(0, u16::MAX),
        help_heading = "Filter",
    )]
    pub sport: Option<u16>,

    /// Destination port, 0 to 65535
    #[arg(
        long, value_name = "PORT", value_parser = whole::<u16>(0, u16::MAX),
        help_heading = "Filter",
    )]
    pub dport: Option<u16>,

    /// Upper-layer protocol: tcp, udp, sctp, icmp, icmp6 and others, or a number from 0 to 255
    #[arg(long, value_name = "NAME|N", help_heading = "Filter")]
    pub proto: Option<Protocol>,
}

impl FilterArgs {
    /// The filter; when no packet can match it, what is wrong with which flags.
    pub(super) fn filter(&self) -> Result<Filter, String> {
        let filter = Filter {
            src: self.src,
            dst: self.dst,
            sport: self.sport,
            dport: self.dport,
            protocol: self.proto,
        };
        filter.check().map_err(|error| match &error {
            FilterError::Families { .. } => format!("--src and --dst: {error}"),
            FilterError::NoPorts(_) => format!("--sport, --dport and --proto: {error}"),
            _ => error.to_string(),
        })?;
        Ok(filter)
    }
}
