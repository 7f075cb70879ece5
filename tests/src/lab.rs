//! A server and its clients: one namespace each, a veth link between the server and each client.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::Result;

use crate::netns::Namespace;

/// An address family; most scenarios hold in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The port that the protected service has in every lab.
pub const PORT: u16 = 8080;

/// A server with some clients.
#[derive(Debug)]
pub struct Lab {
    /// Where the service and limiter run.
    pub server: Namespace,
    /// The clients, each behind an interface of the server's.
    pub clients: Vec<Client>,
}

/// A client host. Each has its own /24 and /64, so each is a source of its own.
#[derive(Debug)]
pub struct Client {
    /// Where its processes and sockets are.
    pub namespace: Namespace,
    /// Its place in [`Lab::clients`], plus one.
    number: u8,
}

/// A client's own interface.
pub const CLIENT_INTERFACE: &str = "eth0";

impl Lab {
    /// A server with that many clients, all up.
    pub fn new(clients: u8) -> Result<Self> {
        let server = Namespace::new()?;
        let clients: Vec<Client> = (1..=clients).map(|number| Client::new(&server, number)).collect::<Result<_>>()?;
        for client in &clients {
            server.wait_link_up(&client.server_interface())?;
            client.namespace.wait_link_up(CLIENT_INTERFACE)?;
        }
        Ok(Self { server, clients })
    }

    /// The server's interfaces, as `--interface` flags.
    pub fn interface_flags(&self) -> Vec<String> {
        self.clients.iter().flat_map(|client| ["--interface".to_owned(), client.server_interface()]).collect()
    }
}

impl Client {
    fn new(server: &Namespace, number: u8) -> Result<Self> {
        let client = Self { namespace: Namespace::new()?, number };
        client.plug_in(server)?;
        Ok(client)
    }

    /// Makes the link to the server. For one whose link was deleted.
    pub fn plug_in(&self, server: &Namespace) -> Result<()> {
        let client = self;
        let server_interface = client.server_interface();
        let [mac, server_mac] = [client.mac(), client.server_mac()].map(format_mac);
        server.ip(&format!(
            "link add {server_interface} address {server_mac} type veth \
             peer name {CLIENT_INTERFACE} address {mac} netns {}",
            client.namespace.path().display()
        ))?;
        let mut server_lines = format!("link set {server_interface} up\n");
        let mut client_lines = format!("link set {CLIENT_INTERFACE} up\n");
        for family in [Family::V4, Family::V6] {
            let length = if family == Family::V4 { 24 } else { 64 };
            let (address, server_address) = (client.address(family), client.server_address(family));
            let silent = client.silent_address(family);
            // Static neighbours: no ARP at the wrong moment, and an answer for addresses that nobody has.
            write!(
                server_lines,
                "addr add {server_address}/{length} dev {server_interface} nodad\n\
                 neigh add {address} lladdr {mac} dev {server_interface}\n\
                 neigh add {silent} lladdr {mac} dev {server_interface}\n"
            )?;
            write!(
                client_lines,
                "addr add {address}/{length} dev {CLIENT_INTERFACE} nodad\n\
                 neigh add {server_address} lladdr {server_mac} dev {CLIENT_INTERFACE}\n"
            )?;
        }
        server.ip(&server_lines)?;
        client.namespace.ip(&client_lines)
    }

    /// The client's address.
    pub fn address(&self, family: Family) -> IpAddr {
        self.link_address(family, 2)
    }

    /// The server's address on the client's link.
    pub fn server_address(&self, family: Family) -> IpAddr {
        self.link_address(family, 1)
    }

    /// An address whose packets come to this client, and of which its kernel knows nothing: it answers none of them. It
    /// is in the same /64 as [`Self::address`], and another /32.
    pub fn silent_address(&self, family: Family) -> IpAddr {
        self.link_address(family, 66)
    }

    /// The service.
    pub fn service(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.server_address(family), PORT)
    }

    /// Name of the server's end of the link.
    pub fn server_interface(&self) -> String {
        format!("client{}", self.number)
    }

    /// Hardware address of the client's end of the link.
    pub fn mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, self.number, 2]
    }

    /// Hardware address of the server's end of the link.
    pub fn server_mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, self.number, 1]
    }

    fn link_address(&self, family: Family, host: u8) -> IpAddr {
        match family {
            // Set apart for benchmarks (RFC 2544) and for documentation (RFC 3849).
            Family::V4 => Ipv4Addr::new(198, 18, self.number, host).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, self.number.into(), 0, 0, 0, host.into()).into(),
        }
    }
}

impl Family {
    /// The address that stands for any.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// How limiter writes the source that `address` belongs to, with the default prefixes.
    pub fn source(address: IpAddr) -> String {
        match address.to_canonical() {
            IpAddr::V4(address) => format!("{address}/32"),
            IpAddr::V6(address) => {
                let network = Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64));
                format!("{network}/64")
            }
        }
    }
}

fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
