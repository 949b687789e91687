//! Which properties of a control group are dumped: the known ones of each controller, and what the user adds or puts in
//! their place.

use crate::{Result, call, invalid};

use super::CgroupOptions;

/// Properties by controller, version 1. Their order is that in which they are set.
const KNOWN: [(&str, &[&str]); 9] = [
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.rt_period_us", "cpu.rt_runtime_us"]),
    (
        "memory",
        &[
            // The limit of memory and swap is never below that of memory.
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "memory.swappiness",
            "memory.soft_limit_in_bytes",
            "memory.move_charge_at_immigrate",
            "memory.oom_control",
            "memory.use_hierarchy",
            "memory.kmem.limit_in_bytes",
            "memory.kmem.tcp.limit_in_bytes",
        ],
    ),
    (
        "cpuset",
        &[
            "cpuset.cpus",
            "cpuset.mems",
            "cpuset.memory_migrate",
            "cpuset.cpu_exclusive",
            "cpuset.mem_exclusive",
            "cpuset.mem_hardwall",
            "cpuset.memory_spread_page",
            "cpuset.memory_spread_slab",
            "cpuset.sched_load_balance",
            "cpuset.sched_relax_domain_level",
        ],
    ),
    ("blkio", &["blkio.weight"]),
    ("net_cls", &["net_cls.classid"]),
    ("net_prio", &["net_prio.ifpriomap"]),
    ("pids", &["pids.max"]),
    ("devices", &["devices.list"]),
    ("freezer", &[]),
];

/// What every group of version 1 has.
const EVERY_V1: [&str; 4] = ["cgroup.clone_children", "notify_on_release", PROCS, TASKS];
/// What every group of version 2 has.
const EVERY_V2: [&str; 5] =
    ["cgroup.subtree_control", "cgroup.max.descendants", "cgroup.max.depth", "cgroup.freeze", "cgroup.type"];

/// The file of a group's processes.
pub const PROCS: &str = "cgroup.procs";
/// The file of a version 1 group's threads.
pub const TASKS: &str = "tasks";

/// Properties by controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Specs(Vec<(String, Vec<String>)>);

impl Specs {
    /// The known ones with the user's.
    ///
    /// # Errors
    /// What the user gave cannot be read.
    pub fn of(options: &CgroupOptions) -> Result<Self> {
        let mut specs = Self(KNOWN.iter().map(|(c, p)| ((*c).to_owned(), owned(p))).collect());
        if let Some(text) = &options.props {
            specs.add(text, "--cgroup-props")?;
        }
        if let Some(path) = &options.props_file {
            let what = format!("--cgroup-props-file {}", path.display());
            let text = std::fs::read_to_string(path).map_err(call(format!("cannot read {what}")))?;
            specs.add(&text, &what)?;
        }
        Ok(specs)
    }

    /// The properties of a group of the hierarchy with these names.
    pub fn properties(&self, names: &[String]) -> Vec<&str> {
        let of = |name: &String| self.0.iter().find(|(c, _)| c == name).map_or(&[][..], |(_, p)| p);
        let own = names.iter().flat_map(of).map(String::as_str);
        let v2 = names.iter().any(String::is_empty);
        own.chain(if v2 { EVERY_V2.iter() } else { EVERY_V1.iter() }.copied()).collect()
    }

    /// Adds what a text says: `"name":`, `- "strategy": "merge"` or `"replace"`, `- "properties": ["a", "b"]`, any number of
    /// times.
    ///
    /// # Errors
    /// The text is not of this form.
    fn add(&mut self, text: &str, what: &str) -> Result<()> {
        let bad = |at: usize| {
            let line = text[..at.min(text.len())].matches('\n').count() + 1;
            invalid!(
                "{what}: line {line} is not of the form \"controller\":, - \"strategy\": \"merge\" or \"replace\", \
                 - \"properties\": [\"a\", \"b\"]"
            )
        };
        let mut tokens = Tokens { text, at: 0 };
        while !tokens.is_at_end() {
            let spec = tokens.spec().ok_or_else(|| bad(tokens.at))?;
            let known = self.0.iter_mut().find(|(c, _)| *c == spec.controller);
            match known {
                Some((_, properties)) if spec.merge => properties.extend(spec.properties),
                Some((_, properties)) => *properties = spec.properties,
                None => self.0.push((spec.controller, spec.properties)),
            }
        }
        Ok(())
    }
}

fn owned(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

struct Spec {
    controller: String,
    merge: bool,
    properties: Vec<String>,
}

struct Tokens<'a> {
    text: &'a str,
    at: usize,
}

impl Tokens<'_> {
    fn skip_blanks(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    fn is_at_end(&mut self) -> bool {
        self.skip_blanks();
        self.at == self.text.len()
    }

    fn takes(&mut self, what: &str) -> bool {
        self.skip_blanks();
        let there = self.text[self.at..].starts_with(what);
        self.at += if there { what.len() } else { 0 };
        there
    }

    fn symbol(&mut self, what: &str) -> Option<()> {
        self.takes(what).then_some(())
    }

    fn quoted(&mut self) -> Option<String> {
        self.symbol("\"")?;
        let (text, _) = self.text[self.at..].split_once('"')?;
        self.at += text.len() + 1;
        Some(text.to_owned())
    }

    fn key(&mut self, key: &str) -> Option<()> {
        self.symbol("-")?;
        (self.quoted()? == key).then_some(())?;
        self.symbol(":")
    }

    fn spec(&mut self) -> Option<Spec> {
        let controller = self.quoted()?;
        self.symbol(":")?;
        self.key("strategy")?;
        let merge = match self.quoted()?.as_str() {
            "merge" => true,
            "replace" => false,
            _ => return None,
        };
        self.key("properties")?;
        self.symbol("[")?;
        let mut properties = Vec::new();
        while !self.takes("]") {
            if !properties.is_empty() {
                self.symbol(",")?;
            }
            // A name of a file in the group's directory, and of nothing else.
            properties.push(self.quoted().filter(|p| !p.contains('/'))?);
        }
        Some(Spec { controller, merge, properties })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str) -> Result<Specs> {
        Specs::of(&CgroupOptions { props: Some(text.into()), ..Default::default() })
    }

    #[test]
    fn what_is_known_is_replaced_or_added_to() {
        let text = "\"pids\":\n - \"strategy\": \"merge\"\n - \"properties\": [ \"pids.x\" ]\n\
                    \"cpu\":\n - \"strategy\": \"replace\"\n - \"properties\": [\"cpu.shares\", \"cpu.y\"]\n\
                    \"new\":\n - \"strategy\": \"merge\"\n - \"properties\": []\n";
        let specs = with(text).unwrap();
        assert_eq!(specs.properties(&["pids".into()])[..2], ["pids.max", "pids.x"]);
        assert_eq!(specs.properties(&["cpu".into()])[..3], ["cpu.shares", "cpu.y", "cgroup.clone_children"]);
        assert_eq!(specs.properties(&["new".into()]), EVERY_V1);
        assert_eq!(specs.properties(&[String::new()]), EVERY_V2);
    }

    #[test]
    fn a_text_of_another_form_is_refused_with_its_line() {
        for text in
            ["cpu:", "\"cpu\"", "\"cpu\":\n - \"strategy\": \"mix\"", "\"cpu\":\n - \"strategy\": \"merge\"\n - x"]
        {
            let message = with(text).unwrap_err().to_string();
            assert!(message.contains("--cgroup-props: line "), "{message}");
        }
        let way_out = "\"cpu\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"../x\"]";
        assert!(with(way_out).is_err());
    }
}
