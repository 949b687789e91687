//! Command lines as CRIU's users and clients write them.

use super::table::Takes;
use super::*;
use dormouse_pages::packed::Method;
use dormouse_resources::cgroup::Manage;

fn parse_line(line: &str) -> Result<Parsed> {
    // Without default files: the machine's own must not change a test.
    let words = line.split(' ').filter(|word| !word.is_empty()).map(OsString::from);
    parse(words.chain(["--no-default-config".into()]).collect())
}

fn dump(line: &str) -> DumpArgs {
    match parse_line(line).expect(line).command {
        Command::Dump(args) => args,
        other => panic!("{line}: {other:?}"),
    }
}

fn restore(line: &str) -> RestoreArgs {
    match parse_line(line).expect(line).command {
        Command::Restore(args) => args,
        other => panic!("{line}: {other:?}"),
    }
}

fn refusal(line: &str) -> String {
    format!("{:#}", parse_line(line).expect_err(line))
}

#[test]
fn clap_is_sound() {
    cli().debug_assert();
}

#[test]
fn table_and_parser_agree() {
    let cli = Cli::command();
    for (verb, rule) in [("dump", (|k| k.dump) as fn(&Known) -> Rule), ("restore", |k| k.restore)] {
        let command = cli.find_subcommand(verb).expect(verb);
        for known in CRIU.iter().chain(table::OURS) {
            if ["help", "version", "daemon"].contains(&known.long) {
                continue;
            }
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(known.long));
            assert_eq!(arg.is_some(), rule(known) == Rule::Works, "{verb} --{}", known.long);
            if let Some(arg) = arg {
                assert_eq!(arg.get_short(), known.short, "{verb} --{}", known.long);
                let takes = arg.get_action().takes_values();
                assert_eq!(takes, known.takes != Takes::Nothing, "{verb} --{}", known.long);
            }
        }
        for arg in command.get_arguments().filter_map(|arg| arg.get_long()) {
            assert!(getopt::find(arg).is_some(), "{verb} --{arg} is not in the table");
        }
    }
}

#[test]
fn plain_command_lines() {
    let args = dump("dump -t 42 -D /img -o dump.log -v4");
    assert_eq!((args.tree, args.common.verbosity, args.kinds.ghost_limit), (42, 4, 1 << 20));
    assert_eq!(args.common.images_dir, PathBuf::from("/img"));
    assert_eq!(args.common.log_file, Some("dump.log".into()));
    assert!(args.options().final_dump && args.timeout() == Some(std::time::Duration::from_secs(10)));
    let args = restore("restore -D /img -d --shell-job");
    assert!(args.restore_detached && args.shell_job && !args.leave_stopped);
}

#[test]
fn command_line_of_the_zdtm_suite() {
    let args = dump("dump --log-file dump.log --images-dir d/1 --verbosity=4 --tree 17 --link-remap --timeout 10");
    assert!(args.kinds.link_remap && args.common.verbosity == 4);
    let args = restore(
        "restore --log-file restore.log --images-dir d/1 --verbosity=4 --restore-sibling --restore-detached \
         --file-validation filesize",
    );
    assert!(args.restore_sibling && args.restore_detached);
    let parsed = parse_line("check -verbosity=0 --feature mnt_id --unprivileged").expect("zdtm's check");
    let Command::Check(args) = parsed.command else { panic!("{parsed:?}") };
    assert_eq!((args.feature.as_deref(), args.common.verbosity), (Some("mnt_id"), 0));
}

#[test]
fn command_line_of_runc_and_lxc() {
    let args = dump(
        "dump -t 9 -D /c -o /c/dump.log -vvvvvv --tcp-established --link-remap --ext-mount-map auto \
         --enable-external-sharing --enable-external-masters --enable-fs hugetlbfs --enable-fs tracefs --force-irmap \
         --skip-in-flight --external tty[8801:4] --ghost-limit 1024 --leave-running",
    );
    assert!(args.leave_running && args.kinds.external == ["tty[8801:4]"] && args.kinds.ghost_limit == 1024);
    let args = restore(
        "restore --tcp-established --link-remap -D /c -o /c/restore.log --root /rootfs --restore-detached \
         --restore-sibling --inherit-fd fd[0]:tty[8801:4] --ext-mount-map console:/dev/pts/3 --veth-pair eth0=veth1 \
         --pidfile pid --manage-cgroups=ignore --network-lock nftables",
    );
    assert_eq!(args.options().inherit_fd, [(0, "tty[8801:4]".into())]);
    assert_eq!(args.root, Some("/rootfs".into()));
}

#[test]
fn the_last_value_counts_and_lists_grow() {
    let args = dump("-D a dump -t 1 -t 2 -D b --action-script x --action-script y --leave-stopped -R");
    assert_eq!((args.tree, args.common.images_dir), (2, PathBuf::from("b")));
    assert_eq!(args.common.action_script, [PathBuf::from("x"), PathBuf::from("y")]);
    assert!(args.leave_running && !args.leave_stopped);
    assert!(!restore("restore --shell-job --no-shell-job").shell_job);
    assert!(!restore("restore --daemon --no-restore-detached").restore_detached);
}

#[test]
fn control_groups_are_managed_as_asked() {
    let options = dump(
        "dump -t 1 --manage-cgroups --cgroup-root name=a:/b --cgroup-root /c --cgroup-dump-controller cpu \
         --cgroup-props-file f --cgroup-yard ../y",
    )
    .options()
    .cgroups;
    assert_eq!((options.manage, options.roots.len()), (Some(Manage::Soft), 2));
    assert_eq!((options.controllers, options.props_file), (vec!["cpu".to_owned()], Some("f".into())));
    assert_eq!(options.yard, Some("../y".into()));
    let options = restore("restore --manage-cgroups=strict --cgroup-props x").options().cgroups;
    assert_eq!((options.manage, options.props), (Some(Manage::Strict), None));
    assert_eq!(restore("restore").options().cgroups.manage, None);
}

#[test]
fn packets_are_held_back_whichever_way_is_named() {
    for (line, skip) in [("", false), ("--network-lock iptables", false), ("--network-lock skip", true)] {
        assert_eq!(dump(&format!("dump -t 1 {line}")).options().network_lock_skip, skip, "{line}");
    }
    assert!(refusal("dump -t 1 --network-lock ebtables").contains("iptables"));
}

#[test]
fn pages_go_to_a_server_or_stay_until_they_are_fetched() {
    use dormouse_dump::Server;
    let at = |server: Option<Server>| match server {
        Some(Server { socket: Some(fd), .. }) => format!("descriptor {fd}"),
        Some(Server { address, port, .. }) => format!("{address}:{port}"),
        None => "nowhere".into(),
    };
    let args = dump("dump -t 1 --lazy-pages --port 7");
    assert_eq!((at(args.server.lazy()), at(args.chain().server)), ("0.0.0.0:7".into(), "nowhere".into()));
    let args = dump("dump -t 1 --page-server --port 7");
    assert_eq!((at(args.server.lazy()), at(args.chain().server)), ("nowhere".into(), "127.0.0.1:7".into()));
    assert_eq!(at(dump("dump -t 1 --lazy-pages --ps-socket 5").server.lazy()), "descriptor 5");
    assert_eq!(at(dump("dump -t 1 --lazy-pages --address ::1").server.lazy()), "::1:0");
}

#[test]
fn pages_are_compressed_by_the_method_that_was_asked_for() {
    let method = |line: &str| dump(line).chain().compress.map(Method::name);
    assert_eq!((method("dump -t 1"), method("dump -t 1 --compress")), (None, Some("lz4")));
    for known in Method::here() {
        assert_eq!(method(&format!("dump -t 1 --compress={}", known.name())), Some(known.name()));
    }
}

#[test]
fn what_cannot_be_ignored_is_refused_by_name() {
    for (line, option) in [
        ("dump -t 1 --compress=xz", "lz4 is"),
        ("dump -t 1 --inherit-fd fd[0]:a", "--inherit-fd"),
        ("restore -J uts:/proc/1/ns/uts", "--join-ns"),
        ("restore --lsm-profile apparmor:x", "--lsm-profile"),
    ] {
        let message = refusal(line);
        assert!(message.contains(option) && message.contains("leave it out"), "{line}: {message}");
    }
    restore("restore --no-file-locks --no-stream --cpu-cap=none");
}

#[test]
fn the_cpu_is_recorded_and_compared_as_asked() {
    assert!(!dump("dump -t 1").options().cpu.image);
    let all = dump("dump -t 1 --cpu-cap").options().cpu;
    assert!(all.cpu && all.image);
    let some = restore("restore --cpu-cap=^fpu").options().cpu;
    assert!(!some.fpu && some.ins && !some.cpu && some.image);
    let parsed = parse_line("cpuinfo check --cpu-cap=ins -D x").expect("cpuinfo");
    let Command::Cpuinfo(args) = parsed.command else { panic!("{parsed:?}") };
    assert!(args.action == "check" && args.cpu_cap.is_some_and(|caps| caps.ins));
    assert!(refusal("cpuinfo").contains("<ACTION>") && refusal("cpuinfo eat").contains("dump"));
    let foreign = Foreign::default();
    let parsed = parse_foreign("cpuinfo dump", &foreign).expect("cpuinfo");
    assert!(matches!(parsed.command, Command::Cpuinfo(args) if args.action == "dump"));
}

#[test]
fn accepted_options_without_effect_are_noted() {
    let parsed = parse_line("restore -t 5 --force-irmap --weak-sysctls").expect("accepted");
    assert_eq!(parsed.notes.len(), 3, "{:?}", parsed.notes);
    assert!(parsed.notes[0].contains("--tree changes nothing in restore"));
}

#[test]
fn check_takes_every_option_of_criu() {
    let line = "check --pre-dump-mode read --auto-dedup --page-server --track-mem --display-stats -v0 -s -t 1 -J x -l";
    assert!(matches!(parse_line(line).expect(line).command, Command::Check(_)));
    let parsed = parse_line("check --pid 77 -j --link-remap").expect("check --pid");
    let Command::Check(args) = parsed.command else { panic!("{parsed:?}") };
    assert!(args.pid == Some(77) && args.kinds.shell_job && args.kinds.link_remap);
}

#[test]
fn a_pre_dump_takes_the_options_of_a_dump() {
    let parsed = parse_line("pre-dump -t 7 -D d --prev-images-dir ../c -j --auto-dedup").expect("pre-dump");
    let Command::PreDump(args) = parsed.command else { panic!("{parsed:?}") };
    assert!(args.tree == 7 && args.kinds.shell_job && args.chain.auto_dedup);
    assert_eq!(args.chain.prev_images_dir, Some(PathBuf::from("../c")));
    assert!(dump("dump -t 1 --track-mem").chain.track_mem);
}

#[test]
fn a_page_server_goes_into_the_background_by_either_option() {
    for line in ["page-server --daemon --port 9 --pidfile f", "page-server -d --port 9 --pidfile f"] {
        let parsed = parse_line(line).expect(line);
        let Command::PageServer(args) = parsed.command else { panic!("{parsed:?}") };
        assert!(args.daemon && args.port == 9 && args.pidfile == Some("f".into()), "{line}");
    }
    let chain = dump("dump -t 1 --page-server --address ::1 --port 9").chain();
    assert!(matches!(chain.server, Some(dormouse_dump::Server { address, port: 9, .. }) if address == "::1"));
}

#[test]
fn connections_are_encrypted_as_asked() {
    let tls = |line: &str| dump(line).chain().server.expect("a server").tls;
    assert_eq!(tls("dump -t 1 --page-server --tls-cert c"), None);
    let options = tls("dump -t 1 --page-server --tls --tls-cacert a --tls-cacrl r --tls-cert c --tls-key k");
    let named = |name: &str| Some(PathBuf::from(name));
    let expected = dormouse_tls::Options {
        cacert: named("a"),
        cacrl: named("r"),
        cert: named("c"),
        key: named("k"),
        any_name: false,
    };
    assert_eq!(options, Some(expected));
    assert_eq!(tls("dump -t 1 --page-server --tls --no-tls --tls-no-cn-verify"), None);
    for line in ["page-server --tls --tls-no-cn-verify", "lazy-pages --page-server --tls --tls-no-cn-verify"] {
        let options = match parse_line(line).expect(line).command {
            Command::PageServer(args) => args.tls.options(),
            Command::LazyPages(args) => args.tls.options(),
            other => panic!("{other:?}"),
        };
        assert!(options.is_some_and(|options| options.any_name && options.cacert.is_none()), "{line}");
    }
}

#[test]
fn pid_is_an_abbreviation_of_pidfile_outside_of_check() {
    assert_eq!(restore("restore --pid file").pidfile, Some("file".into()));
}

#[test]
fn a_command_after_two_dashes_is_for_exec_cmd_alone() {
    let args = restore("restore -D d --exec-cmd -- sh -c true");
    assert!(args.exec_cmd && args.command == ["sh", "-c", "true", "--no-default-config"]);
    assert!(refusal("restore --exec-cmd").contains("COMMAND"));
    assert!(refusal("restore -d sleep").contains("sleep"));
    assert!(refusal("restore -d --exec-cmd -- true").contains("--restore-detached"));
}

#[test]
fn other_commands_of_criu_are_named() {
    for verb in ABSENT {
        let message = refusal(verb);
        assert!(message.contains(verb) && message.contains("not there yet"), "{message}");
    }
    assert!(refusal("exec -d").contains("exec is not there yet"));
    assert!(refusal("dumb").contains("unknown command"));
    assert!(refusal("-v4").contains("no command"));
}

#[test]
fn wrong_values_are_named() {
    for line in ["dump -t 0", "dump -t x", "dump -t 1 --ghost-limit 1T", "dump", "restore -S", "dump -t 1 --close x"] {
        assert!(parse_line(line).is_err(), "{line}");
    }
    assert!(refusal("dump -D d").contains("--tree"));
}

#[test]
fn help_and_version_come_first() {
    let kind = |line: &str| parse_line(line).expect_err(line).downcast::<clap::Error>().expect(line).kind();
    for line in ["-h", "--help", "dump -h", "restore --page-server --help", "page-server -h"] {
        assert_eq!(kind(line), clap::error::ErrorKind::DisplayHelp, "{line}");
    }
    for line in ["--version", "-V", "dump -V"] {
        assert!(matches!(parse_line(line).expect(line).command, Command::Version), "{line}");
    }
}

#[test]
fn command_line_of_the_service() {
    let parsed =
        parse_line("service -v4 -W build -o service.log --address s.socket -d --pidfile pid").expect("service");
    let Command::Service(args) = parsed.command else { panic!("{parsed:?}") };
    assert!(args.restore_detached && args.verbosity == 4 && args.address == Some("s.socket".into()));
    let parsed = parse_line("service --daemon --status-fd 5 --shell-job").expect("service");
    assert!(matches!(&parsed.command, Command::Service(args) if args.restore_detached && args.status_fd == Some(5)));
    assert!(parsed.notes[0].contains("--shell-job changes nothing in service"), "{:?}", parsed.notes);
    let swrk = parse(vec!["swrk".into(), "5".into()]).expect("swrk");
    assert!(matches!(swrk.command, Command::Swrk { fd: 5 }));
}

#[test]
fn options_of_a_request_stand_between_the_files() {
    let file = crate::test_dir::TestDir::new("request");
    let config = file.path().join("runc.conf");
    std::fs::write(&config, "log-file other.log\nno-shell-job\nghost-limit 7\n").expect("write");
    let words = ["--tree=5", "--shell-job", "--tcp-close", "--log-file=r.log"].map(OsString::from);
    let defaults = ["--log-file=criu.log".into()];
    let foreign = Foreign { words: &words, config_file: None, defaults: &defaults, log_to_stderr: false };
    let args = |foreign: &Foreign<'_>| match parse_foreign("dump", foreign).expect("dump").command {
        Command::Dump(args) => args,
        other => panic!("{other:?}"),
    };
    let dump = args(&foreign);
    assert!(dump.kinds.shell_job && dump.common.log_file == Some("r.log".into()));
    let dump = args(&Foreign { config_file: Some(&config), ..foreign });
    assert!(!dump.kinds.shell_job && dump.kinds.tcp_close && dump.kinds.ghost_limit == 7);
    assert_eq!(dump.common.log_file, Some("other.log".into()));
    let dump = args(&Foreign { words: &words[..1], defaults: &defaults, ..Foreign::default() });
    assert_eq!(dump.common.log_file, Some("criu.log".into()));
    let refused = [words[0].clone(), "--ms".into()];
    let error = parse_foreign("dump", &Foreign { words: &refused, ..Foreign::default() }).expect_err("refused");
    assert!(error.to_string().contains("--ms"), "{error}");
}
