//! The Unix socket: protocol, server, client.
