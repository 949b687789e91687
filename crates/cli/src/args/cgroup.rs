//! Options about control groups, the same for `dump` and `restore`.

use std::path::PathBuf;

use dormouse_resources::cgroup::{CgroupOptions, Manage};

/// Control groups.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Control groups")]
pub struct Cgroups {
    /// What is done about control groups: ignore them; none or props: tasks go into groups that are there, which keep their
    /// properties or get the dumped ones; soft: groups are made if they are not there; full: the same, and all get their
    /// properties; strict: none may be there. Without this option soft, as far as it is allowed
    #[arg(long, value_name = "MODE", num_args = 0..=1, require_equals = true, default_missing_value = "soft",
        value_parser = parse_manage)]
    pub manage_cgroups: Option<Manage>,
    /// Dump the groups below this one, or restore into this one, for one controller or for all others
    #[arg(long, value_name = "[CONTROLLER:]/PATH", value_parser = parse_root)]
    pub cgroup_root: Vec<(Option<String>, String)>,
    /// A directory where all hierarchies are mounted, each in one named after its controllers; relative to --work-dir
    #[arg(long, value_name = "DIR")]
    pub cgroup_yard: Option<PathBuf>,
}

/// What of control groups is dumped.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Control groups")]
pub struct CgroupContents {
    /// Properties to dump by controller, in the form of CRIU's manual
    #[arg(long, value_name = "TEXT")]
    pub cgroup_props: Option<String>,
    /// The same in a file, relative to --work-dir
    #[arg(long, value_name = "FILE")]
    pub cgroup_props_file: Option<PathBuf>,
    /// Dump no other controllers than these
    #[arg(long, value_name = "NAME")]
    pub cgroup_dump_controller: Vec<String>,
}

impl Cgroups {
    /// The same for the groups.
    pub fn options(&self) -> CgroupOptions {
        CgroupOptions {
            manage: self.manage_cgroups,
            roots: self.cgroup_root.clone(),
            yard: self.cgroup_yard.clone(),
            ..CgroupOptions::default()
        }
    }
}

impl CgroupContents {
    /// The same for the groups, with how they are managed.
    pub fn options(&self, how: &Cgroups) -> CgroupOptions {
        CgroupOptions {
            props: self.cgroup_props.clone(),
            props_file: self.cgroup_props_file.clone(),
            controllers: self.cgroup_dump_controller.clone(),
            ..how.options()
        }
    }
}

fn parse_manage(text: &str) -> Result<Manage, String> {
    Ok(match text {
        "ignore" => Manage::Ignore,
        "none" => Manage::Existing,
        "props" => Manage::Props,
        "soft" => Manage::Soft,
        "full" => Manage::Full,
        "strict" => Manage::Strict,
        _ => return Err("no such mode; there are ignore, none, props, soft, full and strict".into()),
    })
}

fn parse_root(text: &str) -> Result<(Option<String>, String), String> {
    let (controller, path) = text.split_once(':').map_or((None, text), |(c, path)| (Some(c.to_owned()), path));
    if path.split('/').any(|part| part == "..") {
        return Err(format!("{path:?} is no path from the root of control groups: it leads out of it"));
    }
    Ok((controller, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_for_one_controller_or_for_all() {
        assert_eq!(parse_root("name=a:/b"), Ok((Some("name=a".into()), "/b".into())));
        assert_eq!(parse_root("/b/c"), Ok((None, "/b/c".into())));
        assert_eq!(parse_root(":/b"), Ok((Some("".into()), "/b".into())), "version 2 has no name");
        for wrong in ["..", "/a/../b", "cpu:/a/.."] {
            assert!(parse_root(wrong).is_err_and(|e| e.contains("no path")), "{wrong}");
        }
    }

    #[test]
    fn modes_have_names() {
        assert_eq!(parse_manage("none"), Ok(Manage::Existing));
        assert!(parse_manage("all").is_err_and(|e| e.contains("strict")));
    }
}
