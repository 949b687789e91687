//! The probes on the kernel that runs the tests.

use dormouse_kernel::{Features, Support};
use dormouse_pages::ProbeFeatures;

#[test]
fn probes_agree_with_each_other_and_leave_no_trace() {
    let fds = || std::fs::read_dir("/proc/self/fd").expect("fds").count();
    let before = fds();
    let features = Features::probe();
    for (name, support) in features.list() {
        eprintln!("{name}: {support}");
    }
    eprintln!("caps: {:?}", features.caps.names().collect::<Vec<_>>());
    if features.pagemap_scan_guard == Support::Yes {
        assert_eq!((features.pagemap_scan, features.guard_pages), (Support::Yes, Support::Yes));
    }
    assert_ne!(features.pidfd_getfd, Support::No, "the floor is above Linux 5.6");
    assert_eq!(Features::probe(), features);
    assert_eq!(fds(), before);
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    assert_eq!(children, "", "a probe left a child");
}
