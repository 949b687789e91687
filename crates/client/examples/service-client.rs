//! Asks a service for its version, or to dump or restore: `service-client SOCKET [dump PID DIR | restore DIR]`.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd as _;

use dormouse_client::{Client, options, pb};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [socket] => println!("{:?}", Client::connect(socket)?.version()?),
        [socket, "dump", pid, dir] => {
            let dir = File::open(dir)?;
            let opts = pb::CriuOpts { pid: Some(pid.parse()?), ..options(dir.as_raw_fd()) };
            Client::connect(socket)?.dump(opts, &mut |_, _| true)?;
        }
        [socket, "restore", dir] => {
            let dir = File::open(dir)?;
            // Told at each stage; false would end the restore.
            let opts = pb::CriuOpts { notify_scripts: Some(true), ..options(dir.as_raw_fd()) };
            let pid = Client::connect(socket)?.restore(opts, &mut |stage, _| {
                println!("{}", stage.script());
                true
            })?;
            println!("pid {pid}");
        }
        _ => return Err("usage: service-client SOCKET [dump PID DIR | restore DIR]".into()),
    }
    Ok(())
}
