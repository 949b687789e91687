//! Unix sockets (stream, dgram, seqpacket) in the namespaces of the host.
