//! TCP connections: sequence numbers, queues, options and window, read and put back in the kernel's repair mode.
//!
//! A connection is only in repair mode while it is read, so that whatever ends a dump leaves a connection that works; it is
//! cut (repair mode again, in which closing sends nothing) right before the tree is killed. Until then, and from then to the
//! end of the restore, packets of the connection are dropped ([`super::lock`]).

use std::io;
use std::os::fd::OwnedFd;

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::host::sock::{self, Opt, Queue};
use dormouse_kernel::netlink::{Netlink, diag};

use super::addr::Address;
use super::fin;
use super::inet::tcp_info;
use super::lock::Lock;
use super::opts;
use crate::{Result, call, invalid};

/// Ways to set `TCP_REPAIR`.
const ON: i32 = 1;
const OFF: i32 = 0;
/// Off without a window probe (Linux 4.19).
const OFF_SILENTLY: i32 = -1;

/// Queues of `TCP_REPAIR_QUEUE`.
const NO_QUEUE: i32 = 0;
const RECEIVE: i32 = 1;
const SEND: i32 = 2;

/// Options of `tcp_info`, which the images have too.
const HAS_TIMESTAMPS: u32 = 1;
const HAS_SACK: u32 = 2;
const HAS_WSCALE: u32 = 4;

/// Sets of TCP states, a bit each: which FINs there are in queues.
mod states {
    pub const ESTABLISHED: u32 = 1 << 1;
    pub const SYN_SENT: u32 = 1 << 2;
    pub const FIN_WAIT1: u32 = 1 << 4;
    pub const FIN_WAIT2: u32 = 1 << 5;
    pub const CLOSE: u32 = 1 << 7;
    pub const CLOSE_WAIT: u32 = 1 << 8;
    pub const LAST_ACK: u32 = 1 << 9;
    pub const CLOSING: u32 = 1 << 11;
    /// All that a connection can be dumped in.
    pub const ALL: u32 = ESTABLISHED | SYN_SENT | FIN_WAIT1 | FIN_WAIT2 | CLOSE | CLOSE_WAIT | LAST_ACK | CLOSING;
    /// We ended our direction first.
    pub const SENT_FIRST: u32 = FIN_WAIT1 | FIN_WAIT2 | CLOSING;
    /// We ended our direction after the peer.
    pub const SENT_SECOND: u32 = LAST_ACK | CLOSE;
    /// The peer has acknowledged that.
    pub const ACKNOWLEDGED: u32 = FIN_WAIT2 | CLOSE;
    /// The peer has ended its direction.
    pub const RECEIVED: u32 = CLOSE_WAIT | LAST_ACK | CLOSE | CLOSING;
}

fn repair(fd: &OwnedFd, how: i32, what: &str) -> Result<()> {
    sock::set_int(fd, Opt::TCP_REPAIR, how).map_err(|e| {
        let step =
            if e.raw_os_error() == Some(libc::EPERM) { " (needs CAP_NET_ADMIN; grant it and retry)" } else { "" };
        call(format!("cannot set the repair mode of {what}{step}"))(e)
    })
}

// ---- dump -----------------------------------------------------------------------------------------------------------

/// A connection of the tree that is dumped.
pub struct Connection {
    /// The id of its record.
    pub id: u32,
    /// The socket's number in images.
    pub inode: u32,
    /// Our copy of its descriptor.
    pub fd: OwnedFd,
    /// Its own address.
    pub source: Address,
    /// The peer's.
    pub target: Address,
    /// `SO_REUSEADDR`, which repair mode changes.
    pub reuse: bool,
    /// For messages.
    pub what: String,
}

/// All connections of a tree that is dumped. When it is dropped they go on, unless they were cut.
#[derive(Default)]
pub struct Connections {
    list: Vec<Connection>,
    lock: Option<Lock>,
}

impl Connections {
    /// Notes one.
    pub(super) fn add(&mut self, connection: Connection) {
        self.list.push(connection);
    }

    /// Whether there is none, and nothing is locked.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty() && self.lock.is_none()
    }

    /// Drops packets of all connections from now on, and writes their images; each one's id and state. `everything` if all
    /// packets of the network namespace are to be dropped, which is the tree's own.
    ///
    /// # Errors
    /// The network cannot be locked, a connection cannot be read, or an image not be written.
    pub fn save(&mut self, images: &ImageDir, lock: Option<&str>, everything: bool) -> Result<Vec<(u32, u8)>> {
        self.lock = match lock {
            Some(name) if everything => Some(Lock::everything(name)?),
            Some(name) if !self.list.is_empty() => {
                Some(Lock::new(name, self.list.iter().map(|c| (c.source, c.target)))?)
            }
            _ => None,
        };
        self.list.iter().map(|c| Ok((c.id, c.save(images)?))).collect()
    }

    /// Ends all connections without a word to their peers when the tree is killed, which is to be done next. The network
    /// stays locked for the restore.
    ///
    /// # Errors
    /// setsockopt(2)'s; then they all go on.
    pub fn cut(mut self) -> Result<Cut> {
        for c in &self.list {
            repair(&c.fd, ON, &c.what)?;
        }
        if let Some(lock) = self.lock.take() {
            lock.keep()?;
        }
        Ok(Cut { _list: std::mem::take(&mut self.list) })
    }
}

impl Connections {
    /// The connections are as they were, but their packets stay dropped: for a tree that is left stopped, whose connections
    /// are to go on where it is restored. If it is let go instead, somebody has to take the table away.
    ///
    /// # Errors
    /// As [`Lock::keep`]; packets are let through then.
    pub fn keep_locked(mut self) -> Result<()> {
        let Some(lock) = self.lock.take() else { return Ok(()) };
        tracing::warn!(
            "packets of its TCP connections stay dropped until the tree is restored; to let it go on instead: nft delete \
             table inet {}",
            lock.name()
        );
        lock.keep()
    }
}

/// Connections that are silent: to be held until the tree is gone.
pub struct Cut {
    _list: Vec<Connection>,
}

impl Drop for Connections {
    fn drop(&mut self) {
        for c in &self.list {
            // Those that were not cut are in no repair mode.
            if let Err(e) = c.go_on() {
                tracing::error!("{e}");
            }
        }
    }
}

impl Connection {
    fn go_on(&self) -> Result<()> {
        repair(&self.fd, OFF_SILENTLY, &self.what)?;
        sock::set_int(&self.fd, Opt::SO_REUSEADDR, self.reuse.into())
            .map_err(call(format!("cannot set SO_REUSEADDR of {}", self.what)))
    }

    /// Writes the image; the state.
    fn save(&self, images: &ImageDir) -> Result<u8> {
        repair(&self.fd, ON, &self.what)?;
        let read = self.read();
        self.go_on()?;
        let (state, entry, received, sent) = read?;
        let mut writer = images.writer(ImageKind::TcpStream, self.inode.into())?;
        writer.record(&entry)?;
        writer.payload(&received)?;
        writer.payload(&sent)?;
        writer.finish()?;
        Ok(state)
    }

    fn read(&self) -> Result<(u8, pb::TcpStreamEntry, Vec<u8>, Vec<u8>)> {
        let (fd, what) = (&self.fd, self.what.as_str());
        let info = tcp_info(fd, what)?;
        let state = 1u32.checked_shl(info.state.into()).unwrap_or(0);
        if state & states::ALL == 0 {
            return Err(invalid!("{what}: it is in TCP state {}, which cannot be dumped; retry", info.state));
        }
        let size = |queue| sock::queued(fd, queue).map_err(call(format!("cannot read the queues of {what}")));
        let (mut unacknowledged, mut unsent) = (size(Queue::Unacknowledged)?, size(Queue::Unsent)?);
        if state & states::CLOSE != 0 {
            // What a connection that was reset could not send nobody will get.
            (unacknowledged, unsent) = (0, 0);
        } else if state & (states::SENT_FIRST | states::SENT_SECOND) != 0 {
            // The FIN is counted as a byte.
            (unacknowledged, unsent) = (unacknowledged.saturating_sub(1), unsent.saturating_sub(1));
        }
        let waiting = size(Queue::Received)?;
        let mut entry = pb::TcpStreamEntry {
            inq_len: waiting,
            outq_len: unacknowledged,
            unsq_len: Some(unsent),
            opt_mask: info.options.into(),
            mss_clamp: opts::int(fd, Opt::TCP_MAXSEG, what)?,
            ..Default::default()
        };
        if entry.opt_mask & HAS_WSCALE != 0 {
            entry.snd_wscale = u32::from(info.scales & 0xf);
            entry.rcv_wscale = Some(u32::from(info.scales >> 4));
        }
        if entry.opt_mask & HAS_TIMESTAMPS != 0 {
            entry.timestamp = Some(opts::int(fd, Opt::TCP_TIMESTAMP, what)?);
        }
        let window = sock::get_exact::<20>(fd, Opt::TCP_REPAIR_WINDOW);
        let window = window.map_err(opts::unread(what, Opt::TCP_REPAIR_WINDOW))?;
        let word = |at: usize| u32::from_ne_bytes(window[4 * at..4 * at + 4].try_into().expect("four bytes"));
        (entry.snd_wl1, entry.snd_wnd) = (Some(word(0)), Some(word(1)));
        (entry.max_window, entry.rcv_wnd, entry.rcv_wup) = (Some(word(2)), Some(word(3)), Some(word(4)));
        let (inq_seq, received) = queue(fd, RECEIVE, waiting, what)?;
        let (outq_seq, sent) = queue(fd, SEND, unacknowledged, what)?;
        (entry.inq_seq, entry.outq_seq) = (inq_seq, outq_seq);
        Ok((info.state, entry, received, sent))
    }
}

/// Sequence number at the end of a queue, and its bytes, which stay there.
fn queue(fd: &OwnedFd, queue: i32, len: u32, what: &str) -> Result<(u32, Vec<u8>)> {
    select(fd, queue, what)?;
    let sequence = opts::int(fd, Opt::TCP_QUEUE_SEQ, what)?;
    // One more, to see whether there is more than there should be.
    let mut bytes = vec![0; len as usize + 1];
    if len > 0 {
        let n = sock::peek(fd, &mut bytes).map_err(call(format!("cannot copy a queue of {what}")))?;
        if n != len as usize {
            return Err(invalid!("{what}: a queue of {len} bytes gives {n}; retry"));
        }
    }
    bytes.truncate(len as usize);
    Ok((sequence, bytes))
}

fn select(fd: &OwnedFd, queue: i32, what: &str) -> Result<()> {
    sock::set_int(fd, Opt::TCP_REPAIR_QUEUE, queue).map_err(call(format!("cannot select a queue of {what}")))
}

// ---- restore --------------------------------------------------------------------------------------------------------

/// What a connection is rebuilt from.
pub struct Plan<'a> {
    /// A new socket.
    pub fd: &'a OwnedFd,
    /// The state it was in.
    pub state: u32,
    /// Its own address.
    pub source: Address,
    /// The peer's.
    pub target: Address,
    /// Interface of link-local addresses.
    pub scope: u32,
    /// Its `SO_RCVBUF`.
    pub receive_buffer: u32,
    /// For messages.
    pub what: &'a str,
}

impl Plan<'_> {
    /// Rebuilds the connection; it is left in repair mode.
    ///
    /// # Errors
    /// The image is damaged, or the kernel refuses; needs CAP_NET_ADMIN.
    pub fn restore(&self, entry: &pb::TcpStreamEntry, payload: &[u8]) -> Result<()> {
        let (fd, what) = (self.fd, self.what);
        let state = 1u32.checked_shl(self.state).unwrap_or(0);
        if state & states::ALL == 0 {
            return Err(invalid!("{what}: TCP state {} is none of a connection; the image is damaged", self.state));
        }
        let unsent = entry.unsq_len.unwrap_or(0);
        let sizes = (entry.inq_len as usize).checked_add(entry.outq_len as usize);
        if unsent > entry.outq_len || sizes != Some(payload.len()) {
            return Err(invalid!("{what}: its queues are not as long as they should be; the image is damaged"));
        }
        let (received, sent) = payload.split_at(entry.inq_len as usize);
        let (sent, unsent) = sent.split_at((entry.outq_len - unsent) as usize);
        let fin_received = u32::from(state & states::RECEIVED != 0);
        let fin_sent = u32::from(state & (states::SENT_FIRST | states::SENT_SECOND) != 0);
        let numbers = Numbers {
            received: entry.inq_seq.wrapping_sub(fin_received),
            sent: entry.outq_seq.wrapping_sub(fin_sent),
            unacknowledged: entry.outq_len,
        };
        // The kernel derives the windows that it will offer from the buffer that a connection is made with.
        self.resize(Opt::SO_RCVBUFFORCE, self.receive_buffer / 2)?;
        super::super::files::set_status(fd, libc::O_NONBLOCK, what)?;
        repair(fd, ON, what)?;
        if state & states::SYN_SENT != 0 {
            self.connect(state, entry, &numbers)?;
        } else {
            set(fd, Opt::TCP_MAXSEG, segment_size(entry), what)?;
            self.connect(state, entry, &numbers)?;
            // Whether the program had asked for a size is not told by the kernel.
            set(fd, Opt::TCP_MAXSEG, 0, what)?;
            self.negotiated(entry)?;
        }
        if let Some(timestamp) = entry.timestamp.filter(|_| entry.opt_mask & HAS_TIMESTAMPS != 0) {
            set(fd, Opt::TCP_TIMESTAMP, timestamp, what)?;
        }
        self.widen()?;
        self.fill(RECEIVE, received)?;
        self.fill(SEND, sent)?;
        if !unsent.is_empty() {
            repair(fd, OFF_SILENTLY, what)?;
            self.send_all(unsent)?;
            repair(fd, ON, what)?;
        }
        self.window(state, entry, fin_received)?;
        self.half_closed(state, entry, numbers)
    }

    /// Room for whatever the queues hold; the sizes of the record are set later.
    fn widen(&self) -> Result<()> {
        for opt in [Opt::SO_SNDBUFFORCE, Opt::SO_RCVBUFFORCE] {
            self.resize(opt, i32::MAX as u32 / 2)?;
        }
        Ok(())
    }

    /// Sets the size of a buffer; the kernel doubles what it is told.
    fn resize(&self, opt: Opt, half: u32) -> Result<()> {
        let set = sock::set(self.fd, opt, &half.to_ne_bytes());
        set.map_err(call(format!("cannot set {} of {}", opt.label(), self.what)))
    }

    fn connect(&self, state: u32, entry: &pb::TcpStreamEntry, n: &Numbers) -> Result<()> {
        let (fd, what) = (self.fd, self.what);
        sock::bind(fd, &self.source.to_kernel(self.scope)).map_err(|e| {
            let step = match e.raw_os_error() {
                Some(libc::EADDRNOTAVAIL) => " (no interface has the address; add it and retry)",
                Some(libc::EADDRINUSE) => " (another process uses the address; end it and retry)",
                _ => "",
            };
            call(format!("cannot bind {what}{step}"))(e)
        })?;
        let connecting = state & states::SYN_SENT != 0;
        let sent = n.sent.wrapping_sub(entry.outq_len).wrapping_sub(connecting.into());
        for (queue, sequence) in [(RECEIVE, n.received.wrapping_sub(entry.inq_len)), (SEND, sent)] {
            select(fd, queue, what)?;
            set(fd, Opt::TCP_QUEUE_SEQ, sequence, what)?;
        }
        if connecting {
            repair(fd, OFF_SILENTLY, what)?;
        }
        let connect = || sock::connect(fd, &self.target.to_kernel(self.scope));
        let connected = match connect() {
            // A tree that was left stopped and killed leaves its connections behind, which cannot tell their peers.
            Err(e)
                if e.raw_os_error() == Some(libc::EADDRNOTAVAIL)
                    && end_left_over(self.source, self.target, what) > 0 =>
            {
                connect()
            }
            other => other,
        };
        match connected {
            Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => {
                return Err(call(format!("cannot connect {what} to {}", self.target))(e));
            }
            _ => {}
        }
        if connecting { repair(fd, ON, what) } else { Ok(()) }
    }

    /// What both sides agreed on when they connected.
    fn negotiated(&self, entry: &pb::TcpStreamEntry) -> Result<()> {
        const MAXSEG: u32 = 2;
        const WINDOW: u32 = 3;
        const SACK_PERMITTED: u32 = 4;
        const TIMESTAMP: u32 = 8;
        let mut options = Vec::new();
        if entry.opt_mask & HAS_SACK != 0 {
            options.push((SACK_PERMITTED, 0));
        }
        if entry.opt_mask & HAS_WSCALE != 0 {
            let receive = entry.rcv_wscale.filter(|s| *s < 16 && entry.snd_wscale < 16);
            let receive =
                receive.ok_or_else(|| invalid!("{}: no proper window scale; the image is damaged", self.what))?;
            options.push((WINDOW, entry.snd_wscale | receive << 16));
        }
        if entry.opt_mask & HAS_TIMESTAMPS != 0 {
            options.push((TIMESTAMP, 0));
        }
        options.push((MAXSEG, entry.mss_clamp));
        let bytes: Vec<u8> =
            options.iter().flat_map(|(k, v): &(u32, u32)| [k.to_ne_bytes(), v.to_ne_bytes()].concat()).collect();
        sock::set(self.fd, Opt::TCP_REPAIR_OPTIONS, &bytes)
            .map_err(call(format!("cannot set the options of {}", self.what)))
    }

    fn fill(&self, queue: i32, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        select(self.fd, queue, self.what)?;
        self.send_all(bytes)
    }

    /// Puts bytes into the selected queue. The kernel makes one buffer of each piece, so large ones may fail.
    fn send_all(&self, mut bytes: &[u8]) -> Result<()> {
        let mut piece = bytes.len();
        while !bytes.is_empty() {
            match sock::send(self.fd, &bytes[..piece.min(bytes.len())]) {
                Ok(n) if n > 0 => bytes = &bytes[n..],
                _ if piece > 1024 => piece /= 2,
                Ok(_) => return Err(invalid!("{}: {} bytes do not fit into its queue", self.what, bytes.len())),
                Err(e) => {
                    return Err(call(format!("cannot put {} bytes into a queue of {}", bytes.len(), self.what))(e));
                }
            }
        }
        Ok(())
    }

    /// The windows of both directions.
    ///
    /// The kernel takes a packet of an established connection for one that tells no other window than the last, if its window
    /// is the one that it had when it connected (`tcp_rcv_established`), which it does in repair mode with a window of 0: a
    /// peer that closes its window before it has told another one would be sent what it has no room for. Since Linux
    /// 6.17 it does not believe acknowledgements from behind its window either, so both would wait for ever. Therefore an
    /// established connection starts with what the kernel takes for granted: no room. It asks the peer for its window as
    /// soon as it goes on ([`resume`], [`push`]).
    fn window(&self, state: u32, entry: &pb::TcpStreamEntry, fin_received: u32) -> Result<()> {
        let all = (entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup);
        let (Some(wl1), Some(snd), Some(max), Some(rcv), Some(wup)) = all else { return Ok(()) };
        let snd = if state & states::ESTABLISHED != 0 { 0 } else { snd };
        let words = [wl1, snd, max, rcv.wrapping_add(fin_received), wup.wrapping_sub(fin_received)];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        sock::set(self.fd, Opt::TCP_REPAIR_WINDOW, &bytes)
            .map_err(call(format!("cannot set the window of {}", self.what)))
    }

    /// Puts the FINs into the queues: ours by ending our direction, the peer's by a packet that is made here.
    fn half_closed(&self, state: u32, entry: &pb::TcpStreamEntry, mut n: Numbers) -> Result<()> {
        let acknowledged = state & states::ACKNOWLEDGED != 0;
        if state & states::SENT_FIRST != 0 {
            self.end(acknowledged)?;
        }
        if state & states::RECEIVED != 0 {
            self.packet(entry, &n, fin::FIN)?;
        }
        if state & states::SENT_SECOND != 0 {
            self.end(acknowledged)?;
        }
        if state & states::CLOSE != 0 {
            n.received = n.received.wrapping_add(1);
        }
        if acknowledged {
            n.sent = n.sent.wrapping_add(1);
            self.packet(entry, &n, 0)?;
        }
        Ok(())
    }

    /// Ends our direction; as if the FIN had been sent if it was acknowledged.
    fn end(&self, acknowledged: bool) -> Result<()> {
        if acknowledged {
            select(self.fd, SEND, self.what)?;
        }
        let done = sock::shutdown(self.fd, libc::SHUT_WR);
        done.map_err(call(format!("cannot shut down {}", self.what)))?;
        if acknowledged { select(self.fd, NO_QUEUE, self.what) } else { Ok(()) }
    }

    /// A packet of the peer's to us.
    fn packet(&self, entry: &pb::TcpStreamEntry, n: &Numbers, flags: u8) -> Result<()> {
        let packet = fin::Segment {
            from: self.target,
            to: self.source,
            sequence: n.received,
            acknowledged: n.sent.wrapping_sub(n.unacknowledged),
            flags,
            window: (entry.snd_wnd.unwrap_or(0) >> entry.snd_wscale.min(14)).min(u16::MAX.into()) as u16,
        };
        packet.inject(self.scope).map_err(call(format!(
            "cannot rebuild the half-closed state of {} (needs CAP_NET_RAW and CAP_NET_ADMIN)",
            self.what
        )))
    }
}

/// Ends what is left of this very connection, if nobody has it any more; how many sockets that were.
pub fn end_left_over(source: Address, target: Address, what: &str) -> usize {
    let ended = Netlink::sock_diag().and_then(|mut nl| diag::end_orphans(&mut nl, source.socket(), target.socket()));
    ended.unwrap_or_else(|e| {
        tracing::warn!("cannot end what is left of {what}: {e}");
        0
    })
}

/// The `TCP_MAXSEG` with which a connection has to be made so that it sends segments of the size that it has sent before.
///
/// The kernel derives that size from the peer's maximum when it connects, and not again when the maximum is repaired: the
/// connection would send segments of 536 bytes for good. Besides being slow they take several times their size in the peer's
/// memory, which then does not hold what the peer has promised room for.
fn segment_size(entry: &pb::TcpStreamEntry) -> u32 {
    /// `TCP_MIN_MSS` and `MAX_TCP_WINDOW`: what setsockopt(2) takes.
    const RANGE: std::ops::RangeInclusive<u32> = 88..=32767;
    /// `TCP_MSS_DEFAULT`: smaller windows are filled by one segment.
    const DEFAULT: u32 = 536;
    // As the kernel does: no more than half of what the peer has ever had room for.
    let window = entry.max_window.filter(|w| *w > 0).map_or(u32::MAX, |w| if w > DEFAULT { w / 2 } else { w });
    entry.mss_clamp.min(window).clamp(*RANGE.start(), *RANGE.end())
}

/// Sequence numbers behind the data of both queues, before the FINs.
struct Numbers {
    received: u32,
    sent: u32,
    unacknowledged: u32,
}

fn set(fd: &OwnedFd, opt: Opt, value: u32, what: &str) -> Result<()> {
    sock::set_int(fd, opt, value as i32).map_err(call(format!("cannot set {} of {what}", opt.label())))
}

/// Lets a rebuilt connection go on.
///
/// # Errors
/// setsockopt(2)'s.
pub fn resume(fd: &OwnedFd, reuse: bool, what: &str) -> Result<()> {
    let off = match sock::set_int(fd, Opt::TCP_REPAIR, OFF) {
        // The end of repair mode sends a packet, which may fail for a connection that has ended.
        Err(e) if e.kind() != io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    };
    off.map_err(call(format!("cannot end the repair mode of {what}")))?;
    set(fd, Opt::SO_REUSEADDR, reuse.into(), what)
}

/// Has a connection send what it can, or ask its peer for room until there is some.
///
/// The end of repair mode asks once, without a timer: if that packet or its answer is lost, nothing would be sent before
/// the program writes again.
pub fn push(fd: &OwnedFd) {
    // To set it pushes, with any value before. Best effort: a connection may have ended meanwhile.
    let Ok(before) = sock::get_int(fd, Opt::TCP_NODELAY) else { return };
    for value in [1, before] {
        let _ = sock::set_int(fd, Opt::TCP_NODELAY, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fit_twice_into_the_largest_window() {
        let of =
            |mss_clamp, max_window| segment_size(&pb::TcpStreamEntry { mss_clamp, max_window, ..Default::default() });
        assert_eq!(of(1460, Some(65536)), 1460);
        assert_eq!(of(1460, None), 1460, "images of old kernels have no windows");
        assert_eq!(of(8960, Some(10000)), 5000);
        assert_eq!(of(1460, Some(400)), 400);
        assert_eq!(of(65495, Some(1 << 20)), 32767, "the most that the kernel takes");
        assert_eq!((of(0, Some(1)), of(u32::MAX, Some(u32::MAX))), (88, 32767), "whatever a damaged image says");
    }
}
