//! What goes wrong on a machine: what is said of it, what is kept, and that nothing is left behind.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Xdp, XdpMode, xdp::XdpLink},
};
use capture_ebpf::abi::generator::PROGRAM;
use nix::{errno::Errno, libc, sys::signal::Signal};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use serde_json::Value;
use tapline_tests::{
    capture::{Capture, Ended, exclusive, number},
    disk::{SmallDisk, names},
    generator::{Generator, Template},
    netns::{Namespace, unique_name},
    pcapng::{accepted, counted},
    privilege::{require, test_name},
    privileged,
    process::{tapline_path, wait_until},
    tap::{attached, tap},
    veth::{End, Veth},
};
use tempfile::tempdir;

const SECOND: Duration = Duration::from_secs(1);

/// Holds all that a test sends.
const ROOMY: [&str; 2] = ["--ring-size", "16384"];

/// Flags of a capture that ends by itself at once.
const BRIEF: [&str; 2] = ["--duration", "50ms"];

/// A user without any privilege.
const NOBODY: u32 = 65534;

/// Runs a capture that ends by itself.
fn run(command: Command) -> Ended {
    Capture::spawn(command).wait()
}

#[test]
fn a_full_disk_fails_the_capture_and_what_is_whole_is_kept() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let disk = SmallDisk::new(1024);
    let file = disk.path().join("full.pcapng");
    let flags = [&ROOMY as &[_], &["--buffer-size", "128K"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &file, &flags));
    let template = Template { length: 1000, ..Template::default() };
    Generator::new(&veth.left, template).pinned(0).send_paced(20_000, SECOND / 5);
    let ended = capture.wait();

    let path = file.to_str().unwrap();
    let want = format!("the capture failed: writing {path}: No space left on device");
    assert!(ended.failure().starts_with(&want), "{}", ended.stderr);
    let summary = ended.summary();
    assert!(summary.ending()["failed"].as_str().unwrap().contains("No space left"));
    assert!(summary.dropped_by("write_error") > 0, "{summary:?}");
    assert_eq!(disk.names(), [Path::new("full.pcapng")]);
    let contents = accepted(&file);
    assert_eq!(contents.packets.len() as u64, summary.written());
    assert!(summary.written() > 800, "most of the disk is used: {summary:?}");
}

#[test]
fn a_disk_of_blocks_that_fills_up_under_direct_writes_keeps_what_is_whole() {
    privileged!();
    let loops = || fs::metadata("/dev/loop-control").map(drop).map_err(|error| error.to_string());
    if !require(test_name(|| {}), &loops) {
        return;
    }
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let disk = SmallDisk::ext4(16 << 10);
    let file = disk.path().join("full.pcapng");
    let flags = [&ROOMY as &[_], &["--buffer-size", "256K", "--buffers", "128"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &file, &flags));
    let template = Template { length: 1000, ..Template::default() };
    Generator::new(&veth.left, template).pinned(0).send_paced(30_000, SECOND / 2);
    let ended = capture.wait();

    assert!(ended.failure().contains("No space left on device"), "{}", ended.stderr);
    let summary = ended.summary();
    assert!(summary.dropped_by("write_error") > 0, "{summary:?}");
    let disk_use = &summary.0["disk"];
    assert!(number(&disk_use["direct_bytes"]) > 1 << 20, "{disk_use}");
    assert_eq!(disk.names(), [Path::new("full.pcapng")]);
    assert_eq!(accepted(&file).packets.len() as u64, summary.written());
    assert!(summary.written() > 10_000, "most of the disk is used: {summary:?}");
}

#[test]
fn a_kernel_without_io_uring_writes_through_the_page_cache_and_that_is_said_once() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("cached.pcapng");
    let command = exclusive(&veth.right, &file, &ROOMY);
    let mut capture = spawn_without(libc::SYS_io_uring_setup, None, Errno::ENOSYS, command);
    capture.wait_until_ready();
    let template = Template { length: 1000, ..Template::default() };
    let generator = Generator::new(&veth.left, template).pinned(0);
    let arrived = veth.settle(generator.send_paced(20_000, SECOND / 2));
    let ended = capture.stop();
    let said = "no io_uring: Function not implemented (os error 38): segments are written through \
                the page cache, which is slower";
    assert_eq!(ended.stderr.matches(said).count(), 1, "{}", ended.stderr);
    let summary = ended.success();
    let disk = &summary.0["disk"];
    assert_eq!((number(&disk["direct_bytes"]), summary.hits()), (0, arrived));
    assert!(disk["refused"].as_str().unwrap().starts_with("no io_uring"), "{disk}");
    assert_eq!(accepted(&file).packets.len() as u64, summary.written());
}

#[test]
fn a_disk_that_fills_up_in_rotation_keeps_every_file_whole() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let disk = SmallDisk::new(1000);
    let flags = [&ROOMY as &[_], &["--rotate-bytes", "256K"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &disk.path().join("cap.pcapng"), &flags));
    let template = Template { length: 1000, ..Template::default() };
    Generator::new(&veth.left, template).pinned(0).send_paced(20_000, SECOND / 5);
    let ended = capture.wait();

    assert!(ended.failure().contains("No space left on device"), "{}", ended.stderr);
    let summary = ended.summary();
    assert!(summary.dropped_by("write_error") > 0, "{summary:?}");
    let want: Vec<_> = (1..=4).map(|at| PathBuf::from(format!("cap_{at:05}.pcapng"))).collect();
    assert_eq!(disk.names(), want);
    let packets = |name: &PathBuf| accepted(&disk.path().join(name)).packets.len() as u64;
    assert_eq!(want.iter().map(packets).sum::<u64>(), summary.written());
}

#[test]
fn a_disk_that_is_full_from_the_start_is_found_before_anything_is_attached() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let disk = SmallDisk::new(64);
    disk.fill("ballast");
    let file = disk.path().join("none.pcapng");
    let ended = run(exclusive(&veth.right, &file, &BRIEF));
    let failure = ended.failure();
    assert!(failure.contains(disk.path().to_str().unwrap()), "{failure}");
    assert!(failure.contains("none.pcapng") && failure.contains("No space left"), "{failure}");
    assert!(!ended.stderr.contains("capturing on"), "{}", ended.stderr);
    assert_eq!(disk.names(), [Path::new("ballast")], "nothing is left behind");
}

/// Kills a capture that rotates under load; every file that is visible then must be whole, the
/// interface free, and the next capture must work.
fn kill(command: impl Fn(&End<'_>, &Path, &[&str]) -> Command) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("cap.pcapng");
    let flags = ["--rotate-bytes", "256K"];
    let capture = Capture::start(command(&veth.right, &file, &flags));
    assert!(!attached(&veth.right).is_empty());
    let template = Template { length: 1000, ..Template::default() };
    let generator = Generator::new(&veth.left, template).pinned(0);
    thread::scope(|scope| {
        let load = scope.spawn(|| generator.send_paced(10_000, 2 * SECOND));
        wait_until("a few segments", 20 * SECOND, || names(folder.path()).len() > 4);
        capture.signal(Signal::SIGKILL);
        let ended = capture.wait();
        assert_eq!(ended.status.code(), None, "{}", ended.stderr);
        load.join().unwrap();
    });

    // Closing its files may take the kernel a moment longer than the process lives.
    wait_until("the programs to go", 5 * SECOND, || attached(&veth.right).is_empty());
    let (hidden, visible): (Vec<_>, Vec<_>) = names(folder.path())
        .into_iter()
        .map(|name| name.to_str().unwrap().to_owned())
        .partition(|name| name.starts_with('.'));
    assert!(hidden.len() <= 1 && hidden.iter().all(|name| name.ends_with(".pcapng.part")));
    assert!(visible.len() >= 4, "{visible:?}");
    for (at, name) in visible.iter().enumerate() {
        assert_eq!(*name, format!("cap_{:05}.pcapng", at + 1));
        assert!(!accepted(&folder.path().join(name)).packets.is_empty(), "{name}");
    }

    let again = folder.path().join("again.pcapng");
    let flags = [&BRIEF as &[_], &flags].concat();
    run(command(&veth.right, &again, &flags)).success();
}

#[test]
fn a_killed_capture_leaves_whole_files_and_no_xdp_program() {
    privileged!();
    kill(exclusive);
}

#[test]
fn a_killed_tap_leaves_whole_files_and_no_tcx_program() {
    privileged!();
    kill(tap);
}

#[test]
fn an_interface_that_is_deleted_fails_the_capture_and_what_came_before_is_kept() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veths = [Veth::new(&left, &right), Veth::new(&left, &right)];
    let folder = tempdir().unwrap();
    let file = folder.path().join("gone.pcapng");
    let flags = [&ROOMY as &[_], &["-i", &veths[1].right.name]].concat();
    let capture = Capture::start(exclusive(&veths[0].right, &file, &flags));
    let arrived = veths.each_ref().map(|veth| {
        let generator = Generator::new(&veth.left, Template::default()).pinned(0);
        veth.settle(generator.send_paced(10_000, SECOND / 10))
    });
    let name = &veths[1].right.name;
    right.run(&["ip", "link", "delete", name]);
    let ended = capture.wait();

    assert_eq!(ended.failure(), format!("the capture failed: interface {name} is gone"));
    let summary = ended.summary();
    assert_eq!(summary.ending()["failed"], format!("interface {name} is gone"));
    for (interface, arrived) in summary.interfaces().iter().zip(arrived) {
        assert_eq!(number(&interface["law"]["hits"]["packets"]), arrived);
        assert_eq!(number(&interface["law"]["written"]["packets"]), arrived);
    }
    assert_eq!(accepted(&file).packets.len() as u64, arrived.iter().sum::<u64>());
}

/// An XDP program of somebody else's, attached for as long as this is kept.
struct Other {
    _ebpf: Ebpf,
    _link: XdpLink,
}

impl Other {
    fn attach(end: &End<'_>, mode: XdpMode) -> Self {
        let mut ebpf = EbpfLoader::new().load(capture_ebpf::GENERATOR).unwrap();
        let program: &mut Xdp = ebpf.program_mut(PROGRAM).unwrap().try_into().unwrap();
        program.load().unwrap();
        let link = end.namespace.enter(|| {
            let id = program.attach_to_if_index(end.index, mode).unwrap();
            program.take_link(id).unwrap()
        });
        Self { _ebpf: ebpf, _link: link }
    }
}

/// The id of an interface's XDP program, as `ip` shows it.
fn xdp_id(end: &End<'_>) -> Option<u64> {
    let output = end.namespace.run(&["ip", "-json", "link", "show", "dev", &end.name]);
    let links: Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["xdp"]["prog"]["id"].as_u64()
}

#[test]
fn another_xdp_program_is_named_and_stays() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("taken.pcapng");
    for (theirs, mode) in [(XdpMode::Driver, "native"), (XdpMode::Skb, "generic")] {
        let other = Other::attach(&veth.right, theirs);
        let id = xdp_id(&veth.right).unwrap();
        for ours in ["auto", "native", "generic"] {
            let flags = [&BRIEF as &[_], &["--xdp", ours]].concat();
            let ended = run(exclusive(&veth.right, &file, &flags));
            let want = format!(
                "{} already runs the XDP program `{PROGRAM}` (id {id}, {mode} mode), and only one \
                 can be attached; Tapline never displaces another's: detach it first (`ip link set \
                 dev {0} xdp off`), or use `--mode tap`, which needs no XDP hook",
                veth.right.name
            );
            assert_eq!(ended.failure(), want, "{ours} beside {mode}");
            assert_eq!(xdp_id(&veth.right), Some(id), "{ours} beside {mode}");
        }
        assert!(names(folder.path()).is_empty(), "no file is begun");
        drop(other);
        assert_eq!(xdp_id(&veth.right), None);
    }
    run(exclusive(&veth.right, &file, &BRIEF)).success();
}

#[test]
fn two_captures_of_one_interface_do_not_disturb_each_other() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let capture =
        Capture::start(exclusive(&veth.right, &folder.path().join("first.pcapng"), &ROOMY));
    let ended = run(exclusive(&veth.right, &folder.path().join("second.pcapng"), &BRIEF));
    let failure = ended.failure();
    assert!(failure.contains("already runs the XDP program `exclusive` (id "), "{failure}");
    let generator = Generator::new(&veth.left, Template::default());
    generator.send(100);
    let arrived = veth.settle(100);
    assert_eq!(capture.stop().success().written(), arrived);
}

/// `tapline`, where everyone may run it.
fn public_copy(folder: &Path) -> PathBuf {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    let copy = folder.join("tapline");
    fs::copy(tapline_path(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

/// A capture by a user who is not root, with these capabilities (`+bpf,+net_raw`).
fn unprivileged(end: &End<'_>, program: &Path, write: &Path, capabilities: &str) -> Command {
    let set = format!("-all,{capabilities}");
    let set = set.trim_end_matches(',');
    let id = NOBODY.to_string();
    let mut command = end.namespace.command("setpriv", ["--reuid", &id, "--regid", &id]);
    command.args([
        "--clear-groups",
        "--inh-caps",
        set,
        "--ambient-caps",
        set,
        "--bounding-set",
        set,
    ]);
    // What a user may lock in memory on most systems, and a UMEM of twice that.
    command.args(["prlimit", "--memlock=8388608"]);
    command.arg(program).args(["capture", "--mode", "exclusive", "--json", "-i", &end.name]);
    command.args(["--umem-frames", "8192"]);
    command.arg("-w").arg(write).args(BRIEF);
    command
}

#[test]
fn missing_privileges_are_named_with_the_command_that_gives_them() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let program = public_copy(folder.path());
    let home = folder.path().join("home");
    fs::create_dir(&home).unwrap();
    chown(&home, Some(NOBODY), Some(NOBODY)).unwrap();

    let loading = "loading the capture program needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or \
                   root): run it with sudo, or once `sudo setcap \
                   cap_bpf,cap_ipc_lock,cap_net_admin,cap_net_raw,cap_perfmon+ep";
    for (capabilities, want) in [
        ("", loading),
        ("+net_admin,+net_raw,+perfmon,+ipc_lock", loading),
        ("+bpf,+net_admin,+net_raw,+ipc_lock", loading),
        ("+bpf,+net_raw,+perfmon,+ipc_lock", loading),
        ("+bpf,+net_admin,+perfmon,+ipc_lock", "it needs CAP_NET_RAW (or root)"),
        ("+bpf,+net_admin,+net_raw,+perfmon", "give CAP_IPC_LOCK, or raise the limit"),
    ] {
        let write = home.join("denied.pcapng");
        let ended = run(unprivileged(&veth.right, &program, &write, capabilities));
        let failure = ended.failure();
        assert!(failure.contains(want), "{capabilities}: {failure}");
        // Not a page of the verifier's.
        assert!(ended.stderr.lines().count() <= 2, "{capabilities}: {}", ended.stderr);
    }
    assert!(names(&home).is_empty());
    assert_eq!(attached(&veth.right), [""; 0]);

    // Just what the message says is enough.
    let all = "+bpf,+ipc_lock,+net_admin,+net_raw,+perfmon";
    let write = home.join("allowed.pcapng");
    run(unprivileged(&veth.right, &program, &write, all)).success();
    assert_eq!(counted(&write), 0);

    let mut ranked = unprivileged(&veth.right, &program, &home.join("ranked.pcapng"), all);
    ranked.arg("--realtime");
    let ended = run(ranked);
    let failure = ended.failure();
    assert!(
        failure.contains("no real-time priority, for which it needs CAP_SYS_NICE"),
        "{failure}"
    );

    let write = folder.path().join("elsewhere.pcapng");
    let ended = run(unprivileged(&veth.right, &program, &write, all));
    let failure = ended.failure();
    let place = folder.path().to_str().unwrap();
    assert!(failure.contains(place) && failure.contains("Permission denied"), "{failure}");
}

#[test]
fn an_output_that_cannot_be_made_is_named() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    for (place, cause) in [
        ("missing/a.pcapng", "No such file or directory"),
        ("file/a.pcapng", "Not a directory"),
        ("file/", "File exists"),
    ] {
        // By hand: a `PathBuf` loses the slash at the end.
        let write = format!("{}/{place}", folder.path().display());
        let ended = run(exclusive(&veth.right, Path::new(&write), &BRIEF));
        let failure = ended.failure();
        let named = format!("{}/", folder.path().display());
        assert!(failure.starts_with("creating ") && failure.contains(&named), "{place}: {failure}");
        assert!(failure.contains(cause), "{place}: {failure}");
        assert_eq!(attached(&veth.right), [""; 0], "{place}");
    }
    assert_eq!(names(folder.path()), [Path::new("file")]);
}

#[test]
fn an_unknown_interface_is_answered_with_those_that_there_are() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let unknown = End { name: "eth99".into(), ..veth.right.clone() };
    let ended = run(exclusive(&unknown, Path::new("/dev/null"), &BRIEF));
    let want = format!(
        "no interface `eth99` in this network namespace, which has lo and {}",
        veth.right.name
    );
    assert_eq!(ended.failure(), want);
}

#[test]
fn an_interface_in_use_is_taken_only_with_the_word_that_it_is_a_mirror_port() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("refused.pcapng");
    let name = veth.right.name.as_str();
    let bridge = unique_name("b");
    let uses: [(&[&str], &[&str], String); 3] = [
        (
            &["ip", "address", "add", "10.1.2.3/24", "dev", name],
            &["ip", "address", "flush", "dev", name],
            format!("{name} carries 10.1.2.3/24: "),
        ),
        (
            &["ip", "route", "add", "default", "dev", name],
            &["ip", "route", "flush", "dev", name],
            format!("{name} carries the default route: "),
        ),
        (
            &["ip", "link", "set", name, "master", &bridge],
            &["ip", "link", "set", name, "nomaster"],
            format!("{name} is a port of {bridge}: "),
        ),
    ];
    right.run(&["ip", "link", "add", &bridge, "type", "bridge"]);
    for (begin, end, what) in uses {
        right.run(begin);
        let ended = run(exclusive(&veth.right, &file, &BRIEF));
        let failure = ended.failure();
        assert!(failure.starts_with(&what), "{failure}");
        assert!(failure.contains("takes every matching packet away from this host"), "{failure}");
        assert!(failure.ends_with("say so with --mirror-port"), "{failure}");
        assert!(names(folder.path()).is_empty() && xdp_id(&veth.right).is_none());

        let flags = [&BRIEF as &[_], &["--mirror-port"]].concat();
        run(exclusive(&veth.right, &file, &flags)).success();
        fs::remove_file(&file).unwrap();
        right.run(end);
    }
    run(exclusive(&veth.right, &file, &BRIEF)).success();
}

#[test]
fn a_driver_without_a_feature_is_named_with_what_works() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("lacking.pcapng");
    let bridge = End { name: unique_name("b"), ..veth.right.clone() };
    right.run(&["ip", "link", "add", &bridge.name, "type", "bridge"]);
    right.run(&["ip", "link", "set", &bridge.name, "up"]);

    let flags = [&BRIEF as &[_], &["--xdp", "native"]].concat();
    let ended = run(exclusive(&bridge, &file, &flags));
    let want = format!(
        "{} does not take an XDP program in native mode (bridge driver, MTU 1500); `--xdp generic` \
         works with every driver",
        bridge.name
    );
    assert!(ended.failure().starts_with(&want), "{}", ended.stderr);

    // Without a word, generic mode it is, and that is said, there and in the file.
    let ended = run(exclusive(&bridge, &file, &BRIEF));
    let want = "exclusive, generic XDP, BPF rings, 1 queue";
    assert!(ended.stderr.contains(want), "{}", ended.stderr);
    assert_eq!(ended.success().interfaces()[0]["xdp"], "generic");
    let bytes = fs::read(&file).unwrap();
    assert!(bytes.windows(11).any(|window| window == b"generic XDP"));

    let flags = [&BRIEF as &[_], &["--zero-copy", "on"]].concat();
    let ended = run(exclusive(&veth.right, &file, &flags));
    let want = format!(
        "no AF_XDP socket on queue 0 of {}: the driver has no zero-copy; use `--zero-copy auto`",
        veth.right.name
    );
    assert!(ended.failure().starts_with(&want), "{}", ended.stderr);
    assert_eq!(attached(&veth.right), [""; 0]);
}

#[test]
fn huge_pages_that_were_not_reserved_are_asked_for() {
    privileged!();
    let name = test_name(|| {});
    let free = || match fs::read_to_string("/proc/sys/vm/nr_hugepages") {
        Ok(pages) if pages.trim() == "0" => Ok(()),
        Ok(pages) => Err(format!("{} huge pages are reserved here", pages.trim())),
        Err(_) => Ok(()),
    };
    if !require(name, &free) {
        return;
    }
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let flags = [&BRIEF as &[_], &["--huge-pages"]].concat();
    let ended = run(exclusive(&veth.right, &folder.path().join("huge.pcapng"), &flags));
    let failure = ended.failure();
    assert!(failure.contains("too few huge pages are free; reserve them"), "{failure}");
    assert!(failure.contains("sysctl vm.nr_hugepages="), "{failure}");
}

/// Runs a command as if the kernel refused a system call, if its first argument is this.
fn without(call: i64, first: Option<u64>, error: Errno, command: Command) -> Ended {
    spawn_without(call, first, error, command).wait()
}

fn spawn_without(call: i64, first: Option<u64>, error: Errno, command: Command) -> Capture {
    let conditions = first.map(|value| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap()
    });
    let rules = conditions.map(|condition| SeccompRule::new(vec![condition]).unwrap());
    let filter = SeccompFilter::new(
        BTreeMap::from([(call, rules.into_iter().collect())]),
        SeccompAction::Allow,
        SeccompAction::Errno(error as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    // A filter is its thread's and its children's, and cannot be taken off.
    let filtered = thread::spawn(move || {
        apply_filter(&filter).unwrap();
        Capture::spawn(command)
    });
    filtered.join().unwrap()
}

#[test]
fn a_kernel_without_a_feature_is_named_with_it() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("old.pcapng");
    let af_xdp = u64::try_from(libc::AF_XDP).unwrap();
    for (call, first, error, want) in [
        (
            libc::SYS_socket,
            Some(af_xdp),
            Errno::EAFNOSUPPORT,
            ": this kernel is built without AF_XDP (CONFIG_XDP_SOCKETS)",
        ),
        (
            libc::SYS_bpf,
            None,
            Errno::ENOSYS,
            "the kernel refused the capture program; `tapline doctor` says what this kernel lacks",
        ),
    ] {
        let flags = [&BRIEF as &[_], &["--transport", "af-xdp"]].concat();
        let ended = without(call, first, error, exclusive(&veth.right, &file, &flags));
        assert!(ended.failure().contains(want), "{}", ended.stderr);
        assert!(names(folder.path()).is_empty(), "{want}");
        assert_eq!(attached(&veth.right), [""; 0], "{want}");
    }
}

#[test]
fn a_kernel_without_tcx_captures_a_live_interface_by_clsact() {
    /// `BPF_LINK_CREATE`
    const LINK_CREATE: u64 = 28;
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("old.pcapng");
    let refused = |flags: &[&str]| {
        let command = tap(&veth.right, &file, &[&BRIEF as &[_], flags].concat());
        without(libc::SYS_bpf, Some(LINK_CREATE), Errno::EINVAL, command)
    };
    let ended = refused(&[]);
    assert!(ended.stderr.contains("tap, tc, "), "{}", ended.stderr);
    assert_eq!(ended.success().interfaces()[0]["hook"], "tc");
    assert_eq!(attached(&veth.right), [""; 0]);

    let ended = refused(&["--tap-hook", "tcx"]);
    let want = format!("{} does not take a tc program (tcx, ingress): ", veth.right.name);
    assert!(ended.failure().starts_with(&want), "{}", ended.stderr);
    assert_eq!(attached(&veth.right), [""; 0]);
}

#[test]
fn a_reader_of_the_pipe_that_goes_away_fails_the_capture() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let (mut capture, stdout) = Capture::streaming(exclusive(&veth.right, Path::new("-"), &ROOMY));
    capture.wait_until_ready();
    let generator = Generator::new(&veth.left, Template::default()).pinned(0);
    generator.send(10);
    drop(stdout);
    let arrived = veth.settle(10 + generator.send_paced(10_000, SECOND / 2));
    let ended = capture.wait();
    let want = "the capture failed: writing the output stream: Broken pipe";
    assert!(ended.failure().starts_with(want), "{}", ended.stderr);
    let summary = ended.summary();
    assert!(summary.dropped_by("write_error") > 0 && summary.hits() <= arrived, "{summary:?}");
}
