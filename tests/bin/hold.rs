//! Opens connections and holds them until it is killed: `limiter-test-hold SERVER COUNT` prints `holding` when each has
//! got the server's greeting.

use std::{
    error::Error,
    io::Read,
    net::{SocketAddr, TcpStream},
    thread,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let server: SocketAddr = arguments.next().ok_or("usage: limiter-test-hold SERVER COUNT")?.parse()?;
    let count: usize = arguments.next().ok_or("usage: limiter-test-hold SERVER COUNT")?.parse()?;
    let mut connections = Vec::new();
    for _ in 0..count {
        let mut connection = TcpStream::connect(server)?;
        connection.read_exact(&mut [0])?;
        connections.push(connection);
    }
    println!("holding");
    loop {
        thread::park();
    }
}
