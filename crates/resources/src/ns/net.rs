//! A tree's own network namespace: its loopback device with addresses, routes, rules, filter rules and settings, made again in
//! a new namespace; or an existing one that a restore joins (`--join-ns`).
//!
//! Host and tree are in it together: a dump and a restore go there ([`Visit`]), so every socket and list is the tree's. Filter
//! rules are saved and loaded by nft(8) and iptables-save(8), and only if there are any. Connections that the kernel tracks are not
//! kept: it finds them again by their next packet.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use dormouse_images::{ImageDir, ImageError, ImageKind, pb};
use dormouse_kernel::HostPid;
use dormouse_kernel::netlink::Netlink;
use dormouse_kernel::netlink::route::{Link, Listed};

use super::{Visit, sysctl};
use crate::checkpoint::TreeImage;
use crate::{Blocker, RestoreOptions, Result, call, invalid};

/// What is saved as messages, where.
const LISTS: [(ImageKind, Listed); 3] = [
    (ImageKind::Ifaddr, Listed::Addresses),
    (ImageKind::Route, Listed::Routes(libc::AF_INET)),
    (ImageKind::Route6, Listed::Routes(libc::AF_INET6)),
];
const FAMILIES: [i32; 2] = [libc::AF_INET, libc::AF_INET6];
/// Of all rules; ip(8) saves those of one family, which are told apart by the messages themselves.
const RULES: Listed = Listed::Rules(libc::AF_UNSPEC);

/// Filter rules in text: image, names of tables, programs that save and load it.
struct Filter {
    image: ImageKind,
    tables: &'static str,
    save: [&'static str; 2],
    load: [&'static str; 2],
}

/// Those of iptables(8); of either program the first that is installed.
const FILTERS: [Filter; 2] = [
    Filter {
        image: ImageKind::Iptables,
        tables: "/proc/thread-self/net/ip_tables_names",
        save: ["iptables-legacy-save", "iptables-save"],
        load: ["iptables-legacy-restore", "iptables-restore"],
    },
    Filter {
        image: ImageKind::Ip6tables,
        tables: "/proc/thread-self/net/ip6_tables_names",
        save: ["ip6tables-legacy-save", "ip6tables-save"],
        load: ["ip6tables-legacy-restore", "ip6tables-restore"],
    },
];

// ---- dump -----------------------------------------------------------------------------------------------------------

/// What in this thread's network namespace, which is the tree's own, cannot be made again. `pid` is the tree's root.
///
/// # Errors
/// The kernel does not tell what there is.
pub fn blockers(pid: HostPid) -> Result<Vec<Blocker>> {
    let mut found = Vec::new();
    let mut add = |what: String, next_step: &str| {
        found.push(Blocker { pid, fd: None, what, next_step: next_step.into() });
    };
    for link in links()? {
        if !is_plain(&link) {
            add(
                format!("its network namespace has the device {}, which cannot be dumped yet", link.name),
                "take the device away, or dump and restore the tree from inside of the namespace (nsenter --net)",
            );
        }
    }
    for (table, _) in tables()?.into_iter().filter(|(_, owned)| *owned) {
        add(
            format!("the nftables table {table} of its network namespace belongs to a program that runs"),
            "end that program, or have it make the table without the flag owner",
        );
    }
    Ok(found)
}

fn links() -> Result<Vec<Link>> {
    let list = Netlink::route().and_then(|mut nl| nl.links());
    list.map_err(call("cannot list network devices (rtnetlink(7))"))
}

/// The loopback device, or one that every namespace has as it is: a tunnel that the kernel makes with the namespace, and that
/// nobody uses.
fn is_plain(link: &Link) -> bool {
    const FALLBACKS: &[&str] =
        &["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];
    link.loopback || FALLBACKS.contains(&link.name.as_str()) && link.flags & dormouse_kernel::netlink::route::UP == 0
}

/// The tables of nftables; none on a kernel without it.
fn tables() -> Result<Vec<(String, bool)>> {
    match Netlink::netfilter().and_then(|mut nl| nl.tables()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)) => {
            Ok(Vec::new())
        }
        other => other.map_err(call("cannot list the tables of nftables (needs CAP_NET_ADMIN)")),
    }
}

/// Writes this thread's network namespace, which is the tree's own; `id` is its number.
///
/// # Errors
/// The kernel does not tell what there is, a program is missing, or an image cannot be written.
pub fn dump(images: &ImageDir, id: u32) -> Result<()> {
    let id = u64::from(id);
    let mut devices = Vec::new();
    for link in links()?.iter().filter(|l| l.loopback) {
        let (conf4, conf6) = both(&link.name)?;
        devices.push(pb::NetDeviceEntry {
            r#type: pb::NdType::Loopback.into(),
            ifindex: link.index,
            mtu: link.mtu,
            flags: link.flags,
            name: link.name.clone(),
            address: Some(link.address.clone()),
            conf4,
            conf6,
            ..Default::default()
        });
    }
    images.write_all(ImageKind::Netdev, id, &devices)?;
    let ((all_conf4, all_conf6), (def_conf4, def_conf6)) = (both("all")?, both("default")?);
    let settings = pb::NetnsEntry {
        all_conf4,
        all_conf6,
        def_conf4,
        def_conf6,
        unix_conf: sysctl::UNIX.read(None)?,
        ipv4_sysctl: sysctl::IPV4_ALL.read(None)?,
        ..Default::default()
    };
    images.write_one(ImageKind::Netns, id, &settings)?;
    let mut nl = Netlink::route().map_err(call("cannot make a netlink socket"))?;
    for (image, list) in LISTS {
        let messages =
            nl.listed(list).map_err(call(format!("cannot list {list:?} of the tree's network namespace")))?;
        write(images, image, id, &list.to_bytes(&messages))?;
    }
    write(images, ImageKind::Rule, id, &RULES.to_bytes(&rules(&mut nl)?))?;
    for filter in &FILTERS {
        if !fs::read_to_string(filter.tables).unwrap_or_default().is_empty() {
            write(images, filter.image, id, run(&filter.save, &[], &[])?.as_bytes())?;
        }
    }
    if !tables()?.is_empty() {
        write(images, ImageKind::Nftables, id, run(&["nft"], &["list", "ruleset"], &[])?.as_bytes())?;
    }
    Ok(())
}

/// IPv4 and IPv6 settings of a device.
fn both(device: &str) -> Result<(Vec<pb::SysctlEntry>, Vec<pb::SysctlEntry>)> {
    Ok((sysctl::IPV4.read(Some(device))?, sysctl::IPV6.read(Some(device))?))
}

fn rules(nl: &mut Netlink) -> Result<Vec<dormouse_kernel::netlink::Message>> {
    let mut all = Vec::new();
    for family in FAMILIES {
        all.extend(nl.listed(Listed::Rules(family)).map_err(call("cannot list routing rules"))?);
    }
    Ok(all)
}

fn write(images: &ImageDir, image: ImageKind, id: u64, bytes: &[u8]) -> Result<()> {
    let mut file = images.create_file(image, id)?;
    file.write_all(bytes)
        .map_err(|e| ImageError::unwritten(&format!("an image of a network namespace ({image:?})"), e))?;
    Ok(())
}

/// Runs the first of these programs that is installed; its output. It gets `input`.
fn run(programs: &[&str], words: &[&str], input: &[u8]) -> Result<String> {
    let failed = |program: &str, why: &dyn std::fmt::Display| {
        invalid!("cannot take over the filter rules of the tree's network namespace: {program} {why}")
    };
    for program in programs {
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.map_err(|e| failed(program, &format!("cannot be started: {e}")))?,
        };
        // These programs read everything before they write.
        let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input));
        let output = child.wait_with_output().map_err(|e| failed(program, &e))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(failed(program, &format!("ended with {}: {said}", output.status)));
        }
        fed.map_err(|e| failed(program, &format!("did not read them: {e}")))?;
        return String::from_utf8(output.stdout).map_err(|e| failed(program, &e));
    }
    Err(failed(programs[0], &"is not installed; install it and retry"))
}

// ---- restore --------------------------------------------------------------------------------------------------------

/// The number of the tree's own network namespace; `None` if it was in that of the program that dumped it.
///
/// # Errors
/// Tasks are in several, which cannot be restored.
pub fn own(image: &TreeImage) -> Result<Option<u32>> {
    let mut ids: Vec<u32> = image.tasks.iter().filter_map(|t| t.ids.as_ref()?.net_ns_id).collect();
    ids.sort_unstable();
    ids.dedup();
    let Some(host) = image.root_ids.and_then(|ids| ids.net_ns_id) else { return Ok(None) };
    match ids[..] {
        [] => Ok(None),
        [id] => Ok((id != host).then_some(id)),
        _ => Err(invalid!(
            "the tasks are in {} network namespaces, and one can be restored; dump each part of the tree on its own",
            ids.len()
        )),
    }
}

/// Goes into the network namespace that the tree is to be in; a new one is made and filled if it had its own and the user names
/// none. `None` if the tree is to be here.
///
/// # Errors
/// Images are damaged or of what cannot be restored; the kernel refuses; needs CAP_SYS_ADMIN and CAP_NET_ADMIN.
pub fn arrive(image: &TreeImage, options: &RestoreOptions) -> Result<Option<Visit>> {
    let own = own(image)?;
    if let Some(path) = &options.join_net {
        return Visit::into_file(path).map(Some);
    }
    let Some(id) = own else { return Ok(None) };
    let visit = Visit::into_new()?;
    restore(&image.dir, id.into())?;
    Ok(Some(visit))
}

/// Fills this thread's network namespace, which is new.
fn restore(images: &ImageDir, id: u64) -> Result<()> {
    let settings: pb::NetnsEntry = images.read_one(ImageKind::Netns, id)?;
    if let Some(key) = &settings.ext_key {
        return Err(invalid!(
            "the tree was in a network namespace of the user's ({key}); name one with --join-ns net:FILE and retry"
        ));
    }
    let devices: Vec<pb::NetDeviceEntry> = images.read_all(ImageKind::Netdev, id)?;
    if let Some(other) = devices.iter().find(|d| d.r#type() != pb::NdType::Loopback) {
        return Err(invalid!(
            "the tree's network namespace has the device {}, which cannot be restored yet; make a namespace that has it, and \
             name that with --join-ns net:FILE",
            other.name
        ));
    }
    let mut nl = Netlink::route().map_err(call("cannot make a netlink socket"))?;
    let set = |device: &str, conf4: &[pb::SysctlEntry], conf6: &[pb::SysctlEntry]| {
        sysctl::IPV4.write(Some(device), conf4)?;
        sysctl::IPV6.write(Some(device), conf6)
    };
    set("all", &settings.all_conf4, &settings.all_conf6)?;
    set("default", &settings.def_conf4, &settings.def_conf6)?;
    sysctl::UNIX.write(None, &settings.unix_conf)?;
    sysctl::IPV4_ALL.write(None, &settings.ipv4_sysctl)?;
    for device in &devices {
        let cannot = |e| call(format!("cannot set up the network device {}", device.name))(e);
        nl.set_link(device.ifindex, device.flags, device.mtu).map_err(cannot)?;
        set(&device.name, &device.conf4, &device.conf6)?;
    }
    for (image, list) in LISTS {
        for message in list.from_bytes(&read(images, image, id)?).map_err(damaged(image))? {
            if matches!(list, Listed::Routes(_)) && dormouse_kernel::netlink::route::is_the_kernels(&message) {
                continue;
            }
            nl.make(&message).map_err(call(format!("cannot make {list:?} as in the tree's network namespace")))?;
        }
    }
    restore_rules(&mut nl, &RULES.from_bytes(&read(images, ImageKind::Rule, id)?).map_err(damaged(ImageKind::Rule))?)?;
    for filter in &FILTERS {
        let text = read(images, filter.image, id)?;
        if !text.is_empty() {
            run(&filter.load, &[], &text)?;
        }
    }
    let text = read(images, ImageKind::Nftables, id)?;
    if !text.is_empty() {
        run(&["nft"], &["-f", "-"], &text)?;
    }
    Ok(())
}

/// Makes the rules of the families that were saved the same; a new namespace has the usual ones.
fn restore_rules(nl: &mut Netlink, wanted: &[dormouse_kernel::netlink::Message]) -> Result<()> {
    let family = |m: &dormouse_kernel::netlink::Message| m.body.first().copied();
    let are = rules(nl)?;
    for rule in wanted.iter().filter(|w| !are.iter().any(|is| is.body == w.body)) {
        nl.make(rule).map_err(call("cannot make a routing rule as in the tree's network namespace"))?;
    }
    for rule in are {
        let known = wanted.iter().any(|w| family(w) == family(&rule));
        if known && !wanted.iter().any(|w| w.body == rule.body) {
            nl.delete_rule(&rule).map_err(call("cannot take away a routing rule"))?;
        }
    }
    Ok(())
}

fn damaged(image: ImageKind) -> impl FnOnce(std::io::Error) -> crate::ResourceError {
    move |e| invalid!("an image of the network namespace is damaged ({image:?}): {e}")
}

/// A file of the namespace; empty if there is none.
fn read(images: &ImageDir, image: ImageKind, id: u64) -> Result<Vec<u8>> {
    if !images.exists(image, id)? {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    let read = images.open_file(image, id)?.read_to_end(&mut bytes);
    read.map_err(call(format!("cannot read an image of the network namespace ({image:?})")))?;
    Ok(bytes)
}

/// The file by which `--join-ns net:WHICH` names a namespace: one itself, or that of a process.
pub fn named(which: &str) -> std::path::PathBuf {
    match which.parse::<u32>() {
        Ok(pid) => HostPid(pid as i32).proc_path("ns/net"),
        Err(_) => Path::new(which).to_owned(),
    }
}
