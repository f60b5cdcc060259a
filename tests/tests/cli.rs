//! The command line: what is refused and how, and what its output looks like to people and scripts.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tapline_tests::{
    capture::{Capture, Ended, exclusive},
    generator::{Generator, Template},
    netns::Namespace,
    privilege::{require, test_name},
    privileged,
    process::{checked, tapline, tapline_path},
    veth::Veth,
};
use tempfile::tempdir;

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs `tapline`, which must end well and say nothing on standard error.
fn stdout(args: &[&str]) -> String {
    let output = checked(&mut tapline(args));
    assert_eq!(text(&output.stderr), "", "{args:?}");
    text(&output.stdout)
}

/// The keys of a JSON object.
fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap_or_else(|| panic!("{value}")).keys().map(String::as_str).collect()
}

/// What a command line is refused for: its flag, the value, and what would be right.
type Refusal = (&'static str, &'static [&'static str]);

const REFUSED: &[Refusal] = &[
    // Missing and unknown.
    ("-i lo", &["--write <FILE|DIR|->", "required"]),
    ("-w x", &["--interface <IFACE>", "required"]),
    ("-i lo -w x --bogus", &["'--bogus'", "unexpected"]),
    ("-i lo -w x more", &["'more'", "unexpected"]),
    ("-i lo -w x --sample", &["--sample <N>", "required"]),
    ("-i lo -i lo -w x", &["-i lo", "twice"]),
    (
        "-i a -i b -i c -i d -i e -i f -i g -i h -i i -i j -i k -i l -i m -i n -i o -i p -i q -w x",
        &["-i", "17 times", "at most 16"],
    ),
    ("-i lo -w x --no-write", &["--no-write", "--write", "cannot be used with"]),
    ("-i lo -w x --no-capture", &["--no-capture", "--interface", "cannot be used with"]),
    ("-w x --no-capture --sport 1", &["--no-capture", "--sport", "cannot be used with"]),
    ("-w x --no-capture --disk-cpus 4096", &["--disk-cpus", "4096", "from 0 to"]),
    // Filters.
    ("-i lo -w x --src 10.0.0", &["--src", "10.0.0", "IPv4 or IPv6 address"]),
    ("-i lo -w x --src 10.0.0.0/33", &["--src", "10.0.0.0/33", "from 0 to 32"]),
    ("-i lo -w x --dst 2001:db8::/129", &["--dst", "2001:db8::/129", "from 0 to 128"]),
    ("-i lo -w x --dst example.org", &["--dst", "example.org", "IPv4 or IPv6 address"]),
    ("-i lo -w x --src 10.0.0.1 --dst ::1", &["--src and --dst", "10.0.0.1", "::1", "famil"]),
    ("-i lo -w x --sport 70000", &["--sport", "70000", "from 0 to 65535"]),
    ("-i lo -w x --dport http", &["--dport", "http", "from 0 to 65535"]),
    ("-i lo -w x --proto foo", &["--proto", "foo", "from 0 to 255", "udp"]),
    ("-i lo -w x --proto 256", &["--proto", "256", "from 0 to 255"]),
    ("-i lo -w x --proto icmp --dport 1", &["--sport", "--proto", "icmp", "tcp, udp"]),
    ("-i lo -w x --sample 0", &["--sample", "'0'", "from 1 to 4294967295"]),
    ("-i lo -w x --sample 4294967296", &["--sample", "4294967296", "from 1 to 4294967295"]),
    ("-i lo -w x --sample 0.1", &["--sample", "0.1", "from 1 to 4294967295"]),
    ("-i lo -w x --snaplen 262145", &["--snaplen", "262145", "from 0 to 262144"]),
    ("-i lo -w x --snaplen=-1", &["--snaplen", "-1", "from 0 to 262144"]),
    ("-i lo -w x --direction up", &["--direction", "up", "in, out, both"]),
    (
        "-i lo -w x --mode exclusive --direction out",
        &["--direction out", "--mode exclusive", "--mode tap"],
    ),
    // Limits.
    ("-i lo -w x --packets 0", &["--packets", "'0'", "from 1 to 18446744073709551615"]),
    ("-i lo -w x --bytes 0", &["--bytes", "'0'", "at least 1 byte"]),
    ("-i lo -w x --bytes 1.5G", &["--bytes", "1.5G", "K, M, G or T"]),
    ("-i lo -w x --bytes 99999999T", &["--bytes", "99999999T", "at most 18446744073709551615"]),
    ("-i lo -w x --duration 0s", &["--duration", "0s", "from 1ms to 365days"]),
    ("-i lo -w x --duration 400days", &["--duration", "400days", "from 1ms to 365days"]),
    ("-i lo -w x --duration soon", &["--duration", "soon", "from 1ms to 365days"]),
    // Files.
    ("-i lo -w x --rotate-bytes 1K", &["--rotate-bytes", "1024", "at least 262144"]),
    ("-i lo -w x --rotate-every 0s", &["--rotate-every", "0s", "from 1ms to 365days"]),
    ("-i lo -w - --rotate-bytes 1M", &["--rotate-bytes", "-w", "stream"]),
    ("-i lo -w - --rotate-every 1m", &["--rotate-every", "-w", "stream"]),
    ("-i lo -w /dev/null --rotate-every 1m", &["--rotate-every", "-w", "stream"]),
    // Capture path.
    ("-i lo -w x --mode fast", &["--mode", "fast", "tap, exclusive"]),
    ("-i lo -w x --tap-hook tc2", &["--tap-hook", "tc2", "auto, tcx, tc, xdp"]),
    ("-i lo -w x --xdp skb", &["--xdp", "skb", "auto, native, generic"]),
    ("-i lo -w x --zero-copy yes", &["--zero-copy", "yes", "auto, on, off"]),
    // Tuning.
    ("-i lo -w x --ring-size 1000", &["--ring-size", "1000", "power of two from 64 to 65536"]),
    ("-i lo -w x --ring-size 32", &["--ring-size", "32", "from 64 to 65536"]),
    ("-i lo -w x --ring-size 131072", &["--ring-size", "131072", "from 64 to 65536"]),
    ("-i lo -w x --umem-frames 10000", &["--umem-frames", "10000", "power of two"]),
    ("-i lo -w x --umem-frames 2048", &["--umem-frames", "2048", "at least the ring size"]),
    ("-i lo -w x --umem-frames 2097152", &["--umem-frames", "2097152", "to 1048576"]),
    ("-i lo -w x --frame-size 3000", &["--frame-size", "3000", "2048 or 4096"]),
    ("-i lo -w x --bpf-ring-size 3M", &["--bpf-ring-size", "3145728", "power of two", "1048576"]),
    ("-i lo -w x --bpf-ring-size 2G", &["--bpf-ring-size", "2147483648", "1073741824"]),
    ("-i lo -w x --busy-poll 0", &["--busy-poll", "'0'", "from 1 to 65535"]),
    ("-i lo -w x --busy-poll-budget 70000", &["--busy-poll-budget", "70000", "from 1 to 65535"]),
    ("-i lo -w x --buffers 1", &["--buffers", "'1'", "from 2 to 4096"]),
    ("-i lo -w x --buffer-size 1K", &["--buffer-size", "1024", "from 131072 to 1073741824"]),
    ("-i lo -w x --buffer-size 2G", &["--buffer-size", "2147483648", "from 131072 to 1073741824"]),
    ("-i lo -w x --cpus 1,b", &["--cpus", "'b'", "whole number"]),
    ("-i lo -w x --cpus 1023", &["--cpus", "1023", "may use are 0"]),
];

/// What is said when a command line is refused.
fn refusal(args: &[&str]) -> String {
    let output = tapline(args).stdin(Stdio::null()).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    stderr
}

#[test]
fn every_refusal_names_the_flag_the_value_and_the_limit() {
    let folder = tempdir().unwrap();
    for (line, wanted) in REFUSED {
        // What is not refused captures until it is told to stop.
        let mut command = Command::new("timeout");
        command.arg("10").arg(tapline_path()).arg("capture").args(line.split(' '));
        let output = command.current_dir(folder.path()).stdin(Stdio::null()).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert!(output.stdout.is_empty(), "{line}");
        for want in *wanted {
            assert!(stderr.contains(want), "{line}: {want} is not in: {stderr}");
        }
        // A sentence, and perhaps where help is.
        assert!(stderr.lines().count() <= 6, "{line}: {stderr}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "no file is begun");
}

#[test]
fn an_unknown_command_is_refused_with_those_that_there_are() {
    assert!(refusal(&["record"]).contains("'record'"));
    let commands = ["capture", "query", "interfaces", "doctor", "completions", "man"];
    let help = refusal(&[]);
    let man = refusal(&["man", "record"]);
    assert!(man.contains("no command `record`"), "{man}");
    for command in commands {
        assert!(help.contains(command) && man.contains(command), "{command}");
    }
    assert!(refusal(&["completions", "cmd"]).contains("bash, elvish, fish, powershell, zsh"));
}

#[test]
fn version_and_help_are_printed() {
    assert_eq!(stdout(&["--version"]), concat!("tapline ", env!("CARGO_PKG_VERSION"), "\n"));
    for args in
        [&["--help"] as &[&str], &["capture", "--help"], &["query", "--help"], &["help", "doctor"]]
    {
        let help = stdout(args);
        assert!(help.contains("Usage: tapline"), "{help}");
        // The command line in a terminal of the common width.
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
    let help = stdout(&["capture", "--help"]);
    assert!(help.contains("Exit status: 0 done, 1 failed, 2 usage."), "{help}");
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let folder = tempdir().unwrap();
    let script = folder.path().join("tapline.bash");
    fs::write(&script, stdout(&["completions", "bash"])).unwrap();
    for (words, want) in [
        ("tapline ca", "capture"),
        ("tapline capture --rotate-e", "--rotate-every"),
        ("tapline capture --mode ", "tap exclusive"),
        ("tapline completions z", "zsh"),
    ] {
        // As bash calls it: the command, the word to complete, the word before.
        let words: Vec<_> = words.split(' ').collect();
        let [.., before, last] = words.as_slice() else { panic!("{words:?}") };
        let line = format!(
            "source '{}' && COMP_WORDS=({} '{last}') COMP_CWORD={} && _tapline tapline '{last}' \
             '{before}'; echo \"${{COMPREPLY[*]}}\"",
            script.display(),
            words[..words.len() - 1].join(" "),
            words.len() - 1,
        );
        let output = checked(Command::new("bash").args(["--norc", "-c", &line]));
        assert_eq!(text(&output.stderr), "", "{words:?}");
        assert_eq!(text(&output.stdout).trim(), want, "{words:?}");
    }
}

#[test]
fn every_shell_gets_a_script_with_every_flag() {
    let folder = tempdir().unwrap();
    let help = stdout(&["capture", "--help"]);
    let flags = help.split([' ', '\n']).filter(|word| word.starts_with("--") && word.len() > 2);
    let flags: BTreeSet<_> =
        flags.map(|flag| flag.trim_matches(|c: char| !c.is_ascii_alphabetic())).collect();
    assert!(flags.len() > 30, "{flags:?}");
    for (shell, starts, check) in [
        ("bash", "_tapline() {", "bash"),
        ("zsh", "#compdef tapline", "zsh"),
        ("fish", "#", "fish"),
    ] {
        let script = stdout(&["completions", shell]);
        assert!(script.starts_with(starts), "{shell}: {script}");
        for flag in &flags {
            assert!(script.contains(flag), "{shell}: {flag}");
        }
        let path = folder.path().join(shell);
        fs::write(&path, script).unwrap();
        // Where the shell is installed, it reads its script.
        if let Ok(output) = Command::new(check).arg("-n").arg(&path).output() {
            assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
        }
    }
}

#[test]
fn every_manual_page_renders_without_a_warning() {
    let groff = || match Command::new("groff").arg("--version").output() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("groff: {error}")),
    };
    if !require(test_name(|| {}), &groff) {
        return;
    }
    let folder = tempdir().unwrap();
    for command in ["", "capture", "query", "interfaces", "doctor", "completions", "man"] {
        let page =
            stdout(&[&["man"], command.split_whitespace().collect::<Vec<_>>().as_slice()].concat());
        let path = folder.path().join("page");
        fs::write(&path, &page).unwrap();
        let render = ["-man", "-ww", "-Tutf8", "-P-cbou"];
        let output = checked(Command::new("groff").args(render).arg(&path));
        assert_eq!(text(&output.stderr), "", "{command}");
        let rendered = text(&output.stdout);
        let title =
            if command.is_empty() { "tapline".into() } else { format!("tapline-{command}") };
        assert!(rendered.contains(&format!("{title}(1)")), "{command}: {rendered}");
        for heading in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"] {
            assert!(rendered.lines().any(|line| line == heading), "{command}: {heading}");
        }
        if command == "capture" {
            for flag in ["--src", "--rotate-every", "--mirror-port", "--packets"] {
                assert!(rendered.contains(flag), "{flag}");
            }
        }
    }
}

#[test]
fn a_reader_of_the_output_may_stop_early() {
    for args in [&["doctor"] as &[&str], &["completions", "zsh"], &["man"], &["interfaces"]] {
        let mut command = tapline(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(&output.stderr), "", "{args:?}");
        assert!(output.status.code().is_some_and(|code| code < 2), "{args:?}");
    }
}

#[test]
fn interfaces_are_listed_for_people_and_for_scripts() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    right.run(&["ip", "address", "add", "10.1.2.3/24", "dev", &veth.right.name]);
    let tapline = tapline_path().to_str().unwrap();
    let table = text(&right.run(&[tapline, "interfaces"]).stdout);
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("INTERFACE  "), "{table}");
    let line = lines.find(|line| line.starts_with(&veth.right.name)).unwrap();
    assert!(line.contains(" veth ") && line.contains("native, generic"), "{table}");
    assert!(line.ends_with("tap; exclusive needs --mirror-port"), "{table}");

    let json = right.run(&[tapline, "interfaces", "--json"]).stdout;
    let json: Value = serde_json::from_slice(&json).unwrap();
    let entries = json.as_array().unwrap();
    assert_eq!(entries.len(), 2);
    let entry = entries.iter().find(|entry| entry["name"] == veth.right.name).unwrap();
    for key in ["index", "mtu", "driver", "rx_queues", "features", "xdp", "suits"] {
        assert!(keys(entry).contains(key), "{key}: {entry}");
    }
    assert_eq!((&entry["driver"], &entry["mtu"]), (&"veth".into(), &1500.into()));
    assert_eq!(entry["suits"], "tap_or_mirror_port");
    assert!(entry["exclusive_would_cut"].as_str().unwrap().contains("carries 10.1.2.3/24"));
}

#[test]
fn doctor_tells_people_scripts_and_the_exit_status_the_same() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let run = |args: &[&str]| -> Output {
        let args = [&["doctor", "-i", &veth.right.name], args].concat();
        right.command(tapline_path(), args).output().unwrap()
    };
    let (words, json) = (run(&[]), run(&["--json"]));
    assert_eq!((text(&words.stderr), text(&json.stderr)), (String::new(), String::new()));
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(keys(&report), BTreeSet::from(["fine", "sections"]));
    let fine = report["fine"].as_bool().unwrap();
    assert_eq!(
        (words.status.code(), json.status.code()),
        (Some((!fine).into()), Some((!fine).into()))
    );
    let sections = report["sections"].as_array().unwrap();
    assert_eq!(sections[0]["subject"], "host");
    assert_eq!(sections[1]["subject"], veth.right.name);
    let words = text(&words.stdout);
    for check in sections.iter().flat_map(|section| section["checks"].as_array().unwrap()) {
        assert_eq!(keys(check), BTreeSet::from(["found", "mend", "name", "status", "why"]));
        assert!(words.contains(check["name"].as_str().unwrap()), "{check}");
        // What keeps a capture from working comes with the command that mends it.
        assert!(check["status"] != "fail" || check["mend"].is_string(), "{check}");
    }
    let last = words.lines().last().unwrap();
    assert!(last.contains(" ok, ") && last.contains(" warning"), "{last}");

    let unknown = right.command(tapline_path(), ["doctor", "-i", "eth99"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    let stderr = text(&unknown.stderr);
    assert!(stderr.starts_with("tapline: no interface `eth99` "), "{stderr}");
}

/// A short capture, with some packets in it.
fn short(veth: &Veth<'_>, write: &Path, json: bool, flags: &[&str]) -> Ended {
    let name = &veth.right.name;
    let mut command = if json {
        exclusive(&veth.right, write, &["--packets", "10"])
    } else {
        let args = ["capture", "-i", name, "--mode", "exclusive", "--packets", "10", "-w"];
        let mut command = veth.right.namespace.command(tapline_path(), args);
        command.arg(write);
        command
    };
    command.args(flags);
    let mut capture = Capture::spawn(command);
    let generator = Generator::new(&veth.left, Template::default());
    // A quiet one does not say when it captures.
    while !capture.has_ended() {
        generator.send(10);
    }
    capture.wait()
}

#[test]
fn the_summary_in_json_has_the_documented_keys() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let ended = short(&veth, &folder.path().join("keys.pcapng"), true, &[]);
    let summary = ended.success().0;
    assert_eq!(text(&ended.stdout).lines().count(), 1, "one line, for scripts");

    let all =
        ["disk", "ending", "interfaces", "latency", "law", "queues", "seconds", "seen", "segments"];
    assert_eq!(keys(&summary), BTreeSet::from(all));
    let disk = ["cached_bytes", "direct_bytes", "discarded_bytes"];
    assert_eq!(keys(&summary["disk"]), BTreeSet::from(disk));
    let percentiles = ["max_ns", "min_ns", "p50_ns", "p90_ns", "p999_ns", "p99_ns", "samples"];
    for time in ["encoded", "written"] {
        assert_eq!(keys(&summary["latency"][time]), BTreeSet::from(percentiles));
    }
    let law = ["drops", "hits", "written"];
    assert_eq!(keys(&summary["law"]), BTreeSet::from(law));
    let amount = ["bytes", "packets"];
    assert_eq!(keys(&summary["law"]["hits"]), BTreeSet::from(amount));
    assert_eq!(keys(&summary["law"]["written"]), BTreeSet::from(amount));
    let drops = [
        "buffer_full",
        "no_header",
        "no_socket",
        "past_limit",
        "redirect_failed",
        "rx_dropped",
        "rx_ring_full",
        "bpf_ring_full",
        "write_error",
        "spool_full",
        "thinned",
    ];
    assert_eq!(keys(&summary["law"]["drops"]), BTreeSet::from(drops));
    let interface = &summary["interfaces"][0];
    for key in ["driver", "law", "mode", "name", "outcomes", "queues", "seen", "xdp", "zero_copy"] {
        assert!(keys(interface).contains(key), "{key}: {interface}");
    }
    let queue = &summary["queues"][0];
    for key in ["captured", "captured_bytes", "delivered", "interface", "queue", "socket"] {
        assert!(keys(queue).contains(key), "{key}: {queue}");
    }
    let socket = ["dropped", "fill_empty", "invalid", "ring_full"];
    assert_eq!(keys(&queue["socket"]), BTreeSet::from(socket));
    let segment = ["captured_bytes", "first_ns", "last_ns", "packets", "path", "size"];
    assert_eq!(keys(&summary["segments"][0]), BTreeSet::from(segment));
    assert_eq!(summary["ending"], "limit");
}

#[test]
fn the_summary_for_people_adds_up_and_names_the_file() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("words.pcapng");
    let ended = short(&veth, &file, false, &[]);
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
    assert!(ended.stdout.is_empty());
    let first = |word: &str| -> u64 {
        let line = ended.stderr.lines().find(|line| line.contains(word)).unwrap();
        let number = line.trim_start_matches(['=', '+', ' ']).split(' ').next().unwrap();
        number.parse().unwrap_or_else(|_| panic!("{line}"))
    };
    assert_eq!(first(" written, "), 10);
    assert_eq!(first(" hits, "), 10 + first(" dropped"), "{}", ended.stderr);
    let line = format!("{}: 10 packets, ", file.display());
    assert!(ended.stderr.contains(&line), "{}", ended.stderr);
}

#[test]
fn a_pipe_gets_no_live_line_and_a_quiet_capture_says_nothing() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("quiet.pcapng");
    let ended = short(&veth, &file, false, &[]);
    assert!(!ended.stderr.contains(['\r', '\x1b']), "{}", ended.stderr);
    let ended = short(&veth, &file, false, &["--quiet"]);
    assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""));
    assert!(ended.stdout.is_empty());
}

/// Runs a line of shell on a terminal, in a namespace, and gives what appears on it.
fn on_a_terminal(namespace: &Namespace, line: &str) -> (Option<i32>, String) {
    let args = ["--quiet", "--return", "--command", line, "/dev/null"];
    let output = namespace.command("script", args).stdin(Stdio::null()).output().unwrap();
    (output.status.code(), text(&output.stdout))
}

#[test]
fn a_terminal_gets_a_live_line_and_no_pcapng() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let (tapline, name) = (tapline_path().display(), &veth.right.name);
    let capture = format!("{tapline} capture --mode exclusive -i {name}");
    let file = folder.path().join("live.pcapng");
    let command = format!("{capture} -w {} --duration 1500ms", file.display());
    let (code, screen) = on_a_terminal(&right, &command);
    assert_eq!(code, Some(0), "{screen}");
    let live = "\r\x1b[K0 packets, 0 B, 0 packets/s, none dropped";
    assert!(screen.contains(live), "{screen:?}");
    assert!(screen.contains("\r\x1b[K0 packets seen in 1.5"), "it is wiped: {screen:?}");

    let (code, screen) = on_a_terminal(&right, &format!("{capture} -w -"));
    assert_eq!(code, Some(2), "{screen}");
    assert!(screen.contains("-w - would write pcapng to the terminal"), "{screen}");
    assert!(screen.contains("| wireshark -k -i -"), "{screen}");
}
