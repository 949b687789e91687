//! Pages on encrypted connections: who is trusted gets them, and nobody else; whoever is not, the tree goes on.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Case, Ran, TOOL_LIMIT, words};
use crate::chain::serving;
use crate::lazy::{asleep, needs, start_daemon};
use crate::lazy_dump::{moved_by, until};
use crate::programs;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready, refused, word};

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("tls/pages_to_a_server", |case| sent(case, "server", [&case.args.bin; 2])),
        Test::new("tls/a_common_name", |case| sent(case, "named", [&case.args.bin; 2])),
        Test::new("tls/pages_that_come_later", come_later),
        Test::new("tls/pages_that_stay_behind", stay_behind),
        Test::new("tls/who_is_not_trusted", not_trusted),
        Test::new("tls/only_one_side_encrypts", one_side),
        Test::new("tls/files_that_are_of_no_use", useless),
    ]
}

/// Makes everything: two authorities, certificates of the first for `localhost` by either kind of name, for another host, for a
/// client, one that is revoked, and one of the second authority for `localhost`. Some keys are of RSA, as those of CRIU's users.
const SCRIPT: &str = r#"
    set -e
    cd "$1"
    new="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    for ca in ours theirs; do openssl req -x509 $new -days 2 -subj "/CN=$ca" -keyout $ca.key -out $ca.pem; done
    leaf() {
        openssl req ${5:-$new} -subj "$3" -keyout $1.key -out $1.csr
        printf 'basicConstraints=CA:FALSE\n%s\n' "$4" >$1.ext
        openssl x509 -req -in $1.csr -CA $2.pem -CAkey $2.key -CAcreateserial -days 2 -extfile $1.ext -out $1.pem
    }
    leaf server ours /CN=node "subjectAltName=DNS:localhost,IP:127.0.0.1"
    leaf named ours /O=somebody/CN=localhost "" "-newkey rsa:2048 -nodes"
    leaf elsewhere ours /CN=localhost "subjectAltName=DNS:elsewhere"
    leaf client ours /CN=client ""
    leaf revoked ours /CN=client ""
    leaf stranger theirs /CN=localhost "subjectAltName=DNS:localhost,IP:127.0.0.1"
    printf '[ca]\ndefault_ca=d\n[d]\ndatabase=index\ncrlnumber=number\ndefault_md=sha256\ndefault_crl_days=2\n' >ca.conf
    : >index
    echo 01 >number
    openssl ca -config ca.conf -keyfile ours.key -cert ours.pem -revoke revoked.pem
    openssl ca -config ca.conf -keyfile ours.key -cert ours.pem -gencrl -out revoked.crl
"#;

/// Certificates and their keys.
struct Pki(PathBuf);

impl Pki {
    /// Makes them in the test's directory; none without openssl(1).
    fn make(case: &Case<'_>) -> Result<Option<Self>> {
        if case.command("openssl").arg("version").output().is_err() {
            return Ok(None);
        }
        let dir = case.path("pki");
        fs::create_dir_all(&dir)?;
        let made = case.command("/bin/sh").args(["-c", SCRIPT, "sh"]).arg(&dir).output()?;
        ensure!(made.status.success(), "certificates: {}", String::from_utf8_lossy(&made.stderr));
        Ok(Some(Self(dir)))
    }

    fn file(&self, name: &str) -> String {
        word(&self.0.join(name)).to_owned()
    }

    /// The options of one who has this certificate, and trusts those of the first authority.
    fn options(&self, name: &str) -> Vec<String> {
        let file = |ending: &str| self.file(&format!("{name}.{ending}"));
        let (cert, key, ca) = (file("pem"), file("key"), self.file("ours.pem"));
        words(&["--tls", "--tls-cacert", &ca, "--tls-cert", &cert, "--tls-key", &key])
    }
}

macro_rules! made {
    ($case:expr) => {
        match Pki::make($case)? {
            Some(pki) => pki,
            None => return Ok(Outcome::needs("openssl")),
        }
    };
}

/// Dumps to a page server at `localhost`.
fn dump_to(case: &Case<'_>, pid: i32, images: &Path, port: u16, more: &[String]) -> Result<Ran> {
    case.dump(&case.args.bin, pid, images, &[&to("localhost", port), more].concat())
}

fn to(address: &str, port: u16) -> Vec<String> {
    words(&["--page-server", "--address", address, "--port", &port.to_string()])
}

/// A page server of the peer for these images, and its port.
fn serving_by(case: &Case<'_>, peer: &Path, images: &Path, more: &[String]) -> Result<(Child, u16)> {
    fs::create_dir_all(images)?;
    // It does not tell which port it has taken.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = case.command(peer);
    command.args(["page-server", "--address", "127.0.0.1", "--port", &port.to_string(), "-o", "server.log", "-v4"]);
    command.arg("-D").arg(images).args(more);
    let server = case.start_tool(command, "server")?;
    // Local address and state LISTEN in proc_pid_net(5)'s table. A connection would be taken for the dump's.
    let listens = format!(" 0100007F:{port:04X} 00000000:0000 0A ");
    until("a page server that listens", || Ok(fs::read_to_string("/proc/net/tcp")?.contains(&listens)))?;
    Ok((server, port))
}

/// Between us and a peer, which looks at no names of hosts here: it compares a client's with an address.
pub fn exchanged(case: &Case<'_>, dump: &Path, serve: &Path) -> Result<Outcome> {
    sent(case, "server", [dump, serve])
}

fn ended(case: &Case<'_>, server: Child, images: &Path) -> Result<Ran> {
    case.wait_tool(server, "server", &images.join("server.log"), TOOL_LIMIT)
}

/// Pages go to a server with this certificate; the tree is restored from there.
fn sent(case: &Case<'_>, certificate: &str, [dump, serve]: [&Path; 2]) -> Result<Outcome> {
    let pki = made!(case);
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let (here, there) = (case.path("here"), case.path("there"));
    let (mut served_with, mut sent_with) = (pki.options(certificate), pki.options("client"));
    let is_ours = dump == serve;
    if !is_ours {
        for options in [&mut served_with, &mut sent_with] {
            options.push("--tls-no-cn-verify".into());
        }
    }
    let (server, port) = if serve == case.args.bin {
        serving(case, &there, &served_with)?
    } else {
        serving_by(case, serve, &there, &served_with)?
    };
    let address = if is_ours { "localhost" } else { "127.0.0.1" };
    let ran = case.dump(dump, target.pid, &here, &[to(address, port), sent_with].concat())?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    let served = ended(case, server, &there)?;
    ensure!(served.ok(), "page server: {}", served.errors());
    for entry in fs::read_dir(&here)? {
        let entry = entry?;
        let name = entry.file_name();
        let pages = name.to_string_lossy().starts_with("pages-") && entry.metadata()?.len() > 0;
        ensure!(!pages, "pages are in the directory of the dump");
        fs::copy(entry.path(), there.join(name))?;
    }
    case.await_end(target.ids().collect::<Vec<_>>())?;
    case.wake_up(&case.args.bin, &there, &[], &target.tree)?;
    target.look();
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// The tree runs, and its pages come from a page server.
fn come_later(case: &Case<'_>) -> Result<Outcome> {
    let pki = made!(case);
    let Some(images) = asleep(case, "mem_churn", &["--forks"])? else { return Ok(needs()) };
    let (source, port) = serving(case, &images, &[words(&["--lazy-pages"]), pki.options("server")].concat())?;
    let port = port.to_string();
    let options =
        [words(&["--page-server", "--address", "localhost", "--port", &port]), pki.options("client")].concat();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let daemon = start_daemon(case, &images, &options)?;
    let ran = case.restore(&case.args.bin, &images, &["--lazy-pages".into()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    for (child, name) in [(daemon, "lazy-pages"), (source, "server")] {
        let served = case.wait_tool(child, name, &images.join(format!("{name}.log")), TOOL_LIMIT)?;
        ensure!(served.ok(), "{name}: {}", served.errors());
    }
    Ok(Outcome::PASSED)
}

/// The dump is the server, from which the restore elsewhere fetches pages.
fn stay_behind(case: &Case<'_>) -> Result<Outcome> {
    let pki = made!(case);
    let (dump, fetch) = (pki.options("server"), pki.options("client").join(" "));
    let dump: Vec<&str> = dump.iter().map(String::as_str).collect();
    moved_by(case, [&case.args.bin; 3], "mem_churn", &dump, &fetch)
}

/// Whoever of the two is not trusted: the dump fails before it has touched the tree, and the server ends, too.
fn not_trusted(case: &Case<'_>) -> Result<Outcome> {
    let pki = made!(case);
    let target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let crl = words(&["--tls-cacrl", &pki.file("revoked.crl")]);
    let cases: [(&str, &str, &[String], &str); 5] = [
        ("stranger", "client", &[], "UnknownIssuer"),
        ("elsewhere", "client", &[], "not valid for name"),
        ("server", "stranger", &[], "UnknownCA"),
        ("server", "revoked", &crl, "CertificateRevoked"),
        ("revoked", "client", &crl, "Revoked"),
    ];
    for (server, client, more, why) in cases {
        let (here, there) = (case.path("here"), case.path("there"));
        let (child, port) = serving(case, &there, &[&pki.options(server), more].concat())?;
        let ran = dump_to(case, target.pid, &here, port, &[&pki.options(client), more].concat())?;
        refused(case, &ran, &["page server", "--tls-cert", why]).with_context(|| format!("{server} and {client}"))?;
        ensure!(!ran.said.contains("froze"), "{server} and {client}: the tree was stopped");
        let served = ended(case, child, &there)?;
        ensure!(
            !served.ok() && (served.said.contains("certificate") || served.said.contains("alert")),
            "{}",
            served.said
        );
        target.unharmed().with_context(|| format!("{server} and {client}"))?;
    }
    // With the list, the others are still trusted; and names are looked at only if that is not forbidden.
    for (server, more) in [("server", crl), ("elsewhere", words(&["--tls-no-cn-verify"]))] {
        let (here, there) = (case.path("here"), case.path("there"));
        let (child, port) = serving(case, &there, &[&pki.options(server)[..], &more].concat())?;
        let client = [&pki.options("client")[..], &more, &words(&["--leave-running"])].concat();
        let ran = dump_to(case, target.pid, &here, port, &client)?;
        ensure!(ran.ok(), "{server}: {}", ran.errors());
        let served = ended(case, child, &there)?;
        ensure!(served.ok(), "{server}: {}", served.errors());
        target.unharmed()?;
    }
    Ok(Outcome::PASSED)
}

/// What is sent in the clear is not taken, and nothing is sent in the clear where it is to be encrypted.
fn one_side(case: &Case<'_>) -> Result<Outcome> {
    let pki = made!(case);
    let target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    for (server, client) in [(pki.options("server"), Vec::new()), (Vec::new(), pki.options("client"))] {
        let (here, there) = (case.path("here"), case.path("there"));
        let (child, port) = serving(case, &there, &server)?;
        let ran = dump_to(case, target.pid, &here, port, &client)?;
        refused(case, &ran, &["page server"])?;
        let served = ended(case, child, &there)?;
        ensure!(!served.ok(), "the server was content");
        ensure!(fs::read_dir(&there)?.count() == 1, "the server has written more than its log");
        target.unharmed()?;
    }
    Ok(Outcome::PASSED)
}

/// Files that are missing, or hold something else, are named with their option.
fn useless(case: &Case<'_>) -> Result<Outcome> {
    let pki = made!(case);
    let target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let (missing, other) = (pki.file("missing.pem"), pki.file("ca.conf"));
    for option in ["--tls-cacert", "--tls-cacrl", "--tls-cert", "--tls-key"] {
        for file in [&missing, &other] {
            let more = [pki.options("client"), words(&[option, file])].concat();
            let ran = dump_to(case, target.pid, &case.path("img"), 9, &more)?;
            refused(case, &ran, &[option, file])?;
        }
    }
    let ran = dump_to(
        case,
        target.pid,
        &case.path("img"),
        9,
        &[&pki.options("client")[..], &words(&["--tls-key", &pki.file("server.key")])].concat(),
    )?;
    refused(case, &ran, &["client.pem", "server.key"])?;
    target.unharmed()?;
    Ok(Outcome::PASSED)
}
