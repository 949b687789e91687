//! The servers, and what the clients ask those that are reached over TCP.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::case::{Case, pid_of};
use crate::server_load::{Ask, Crowd, Wire, address, header};
use crate::server_local::{sqlite, tmux_nano, tmux_vim};
use crate::server_sql::postgres;
use crate::servers::{Running, Server, Visitors};

/// All of them.
pub const SERVERS: &[Server] = &[
    Server { name: "memcached", programs: &["memcached"], start: memcached },
    Server { name: "redis", programs: &["redis-server"], start: redis },
    Server { name: "nginx", programs: &["nginx"], start: nginx },
    Server { name: "sqlite", programs: &["sqlite3"], start: sqlite },
    Server { name: "tmux_vim", programs: &["tmux", "vim"], start: tmux_vim },
    Server { name: "tmux_nano", programs: &["tmux", "nano"], start: tmux_nano },
    Server { name: "node", programs: &["node"], start: node },
    Server { name: "java", programs: &["java"], start: java },
    Server { name: "postgres", programs: &["psql", "/usr/lib/postgresql"], start: postgres },
];

/// Clients of each server that stay connected.
const CLIENTS: u64 = 3;

/// Keeps the connections of clients that are outside of the tree.
const TCP: &[&str] = &["--tcp-established"];

/// Three clients that ask without end over `wire`, each told its number.
fn crowd(at: SocketAddr, client: fn(u64, Wire) -> Result<Ask>) -> Result<Crowd> {
    let asks = (1..=CLIENTS).map(|number| client(number, Wire::open(at)?)).collect::<Result<_>>()?;
    Ok(Crowd::new(asks))
}

/// Starts the command; clients ask it, and a new one each time.
fn visited(
    case: &Case<'_>,
    command: Command,
    at: SocketAddr,
    client: fn(u64, Wire) -> Result<Ask>,
    newcomer: fn(Wire) -> Result<()>,
) -> Result<Running> {
    let root = pid_of(&case.start(command)?);
    let crowd = crowd(at, client)?;
    let newcomer = Box::new(move || newcomer(Wire::open(at)?));
    Ok(Running { root, options: TCP, client: Box::new(Visitors { crowd, newcomer }) })
}

/// A long text that is different for each number.
fn text_of(number: u64) -> String {
    (0..600).fold(String::new(), |mut text, line| {
        write!(text, "{} ", number * 1000 + line).expect("a string takes everything");
        text
    })
}

fn memcached(case: &Case<'_>) -> Result<Running> {
    let at = address()?;
    let mut command = case.command("memcached");
    command.args(["-u", "root", "-U", "0", "-t", "4", "-l", &at.ip().to_string(), "-p", &at.port().to_string()]);
    let client = |number, mut wire: Wire| {
        let text = text_of(number);
        wire.expect(&format!("set text.{number} 0 0 {}\r\n{text}\r\n", text.len()), "STORED")?;
        wire.expect(&format!("set count.{number} 0 0 1\r\n0\r\n"), "STORED")?;
        let ask: Ask = Box::new(move |n| {
            wire.expect(&format!("incr count.{number} 1\r\n"), &n.to_string())?;
            wire.expect(&format!("get text.{number}\r\n"), &format!("VALUE text.{number} 0 {}", text.len()))?;
            ensure!(wire.value(text.len())? == text, "the text is another one");
            wire.expect("", "END")
        });
        Ok(ask)
    };
    visited(case, command, at, client, |mut wire| wire.expect("get nothing\r\n", "END"))
}

fn redis(case: &Case<'_>) -> Result<Running> {
    let at = address()?;
    let mut command = case.command("redis-server");
    command.args(["--bind", &at.ip().to_string(), "--port", &at.port().to_string(), "--dir"]).arg(&case.dir);
    command.args(["--save", "", "--appendonly", "yes"]);
    let client = |number, mut wire: Wire| {
        let text = text_of(number);
        wire.expect(&format!("SET text.{number} \"{text}\"\r\n"), "+OK")?;
        let ask: Ask = Box::new(move |n| {
            wire.expect(&format!("INCR count.{number}\r\n"), &format!(":{n}"))?;
            wire.expect(&format!("GET text.{number}\r\n"), &format!("${}", text.len()))?;
            ensure!(wire.value(text.len())? == text, "the text is another one");
            Ok(())
        });
        Ok(ask)
    };
    visited(case, command, at, client, |mut wire| wire.expect("PING\r\n", "+PONG"))
}

/// Fetches pages that are to say `count=N`, how many the server has sent over this connection.
fn browser(_: u64, mut wire: Wire) -> Result<Ask> {
    Ok(Box::new(move |n| {
        let (_, page) = wire.get("/")?;
        let count = page.split_whitespace().find_map(|word| word.strip_prefix("count="));
        ensure!(count == Some(&n.to_string()), "the page says `{page}`, not count={n}");
        Ok(())
    }))
}

fn first_page(wire: Wire) -> Result<()> {
    browser(0, wire)?(1)
}

/// Two workers, as another user; the connections are divided among them.
fn nginx(case: &Case<'_>) -> Result<Running> {
    let at = address()?;
    let dir = case.dir.display();
    fs::write(case.path("page.txt"), text_of(1))?;
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|what| format!("{what}_temp_path {dir}/temporary.{what};\n"))
        .concat();
    let configuration = format!(
        "daemon off;\nworker_processes 2;\npid {dir}/pid;\nerror_log stderr;\nevents {{ worker_connections 64; }}\n\
         http {{\n{temporary}access_log {dir}/access;\nkeepalive_timeout 600;\nkeepalive_requests 1000000;\n\
         server {{\nlisten {at} reuseport;\nroot {dir};\nadd_header Count $connection_requests;\n}}\n}}\n"
    );
    fs::write(case.path("configuration"), configuration)?;
    let mut command = case.command("nginx");
    command.arg("-c").arg(case.path("configuration")).arg("-p").arg(&case.dir);
    let client = |_, mut wire: Wire| {
        let ask: Ask = Box::new(move |n| {
            let (head, page) = wire.get("/page.txt")?;
            ensure!(page == text_of(1), "the page is another one");
            let count = header(&head, "count");
            ensure!(count == Some(&n.to_string()), "this is request {count:?} of the connection, not {n}");
            Ok(())
        });
        Ok(ask)
    };
    visited(case, command, at, client, |mut wire| wire.get("/page.txt").map(|_| ()))
}

/// A timer answers: while it stands still, nobody gets a page.
const NODE: &str = "
const [host, port] = process.argv.slice(2);
const waiting = [];
setInterval(() => {
    for (const [response, count] of waiting.splice(0)) response.end(`count=${count} `);
}, 5);
const server = require('http').createServer((request, response) => {
    const socket = request.socket;
    socket.count = (socket.count || 0) + 1;
    waiting.push([response, socket.count]);
});
server.keepAliveTimeout = 600000;
server.listen(Number(port), host);
";

fn node(case: &Case<'_>) -> Result<Running> {
    let at = address()?;
    fs::write(case.path("server.js"), NODE)?;
    let mut command = case.command("node");
    command.arg(case.path("server.js")).args([at.ip().to_string(), at.port().to_string()]);
    visited(case, command, at, browser, first_page)
}

const JAVA: &str = r#"
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;

public class Server {
    public static void main(String[] words) throws Exception {
        var counts = new ConcurrentHashMap<InetSocketAddress, Integer>();
        var server = HttpServer.create(new InetSocketAddress(words[0], Integer.parseInt(words[1])), 0);
        server.createContext("/", exchange -> {
            int count = counts.merge(exchange.getRemoteAddress(), 1, Integer::sum);
            byte[] page = ("count=" + count + " ").getBytes();
            exchange.sendResponseHeaders(200, page.length);
            exchange.getResponseBody().write(page);
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.start();
    }
}
"#;

fn java(case: &Case<'_>) -> Result<Running> {
    let at = address()?;
    fs::write(case.path("Server.java"), JAVA)?;
    let mut command = case.command("java");
    // Any other Java program of the user takes away the shared file of counters of one that does not run.
    command
        .args(["-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Dsun.net.httpserver.nodelay=true"])
        .arg(case.path("Server.java"));
    command.args([at.ip().to_string(), at.port().to_string()]);
    visited(case, command, at, browser, first_page)
}
