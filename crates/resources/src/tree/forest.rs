//! Who forks whom, and when: sessions, process groups, helpers for leaders that are gone.
//!
//! A session is inherited at the fork, so a child of another session than its parent's must be forked before the
//! parent leaves that session, or by somebody who is in it. Leaders that are dead, but whose sessions or groups live
//! on, are played by helpers with their pids until all members have joined.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::checkpoint::TaskImage;
use crate::mem::map::shares_memory;
use crate::{ResourceError, invalid};

/// One process to be forked: a task of the image, or a helper.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its pid.
    pub pid: i32,
    /// Index in the image; `None` for a helper.
    pub task: Option<usize>,
    /// Who calls clone3 for it (index of a node); `None` for the root.
    pub forker: Option<usize>,
    /// Made as a sibling of the forker (CLONE_PARENT).
    pub as_sibling: bool,
    /// Forked after its forker has its memory.
    pub after_memory: bool,
    /// Forked before its forker calls setsid.
    pub before_setsid: bool,
    /// Becomes a session leader.
    pub setsid: bool,
    /// Process group to be in, if it is not inherited: its own pid, or another's.
    pub pgid: Option<i32>,
    /// Node that waits for it (helpers and zombies).
    pub reaper: Option<usize>,
}

/// The nodes, forkers before those they fork.
#[derive(Debug, Default)]
pub struct Forest {
    /// The nodes.
    pub nodes: Vec<Node>,
}

impl Forest {
    /// Nodes that `i` forks, in order.
    pub fn forked_by(&self, i: usize) -> impl Iterator<Item = usize> + '_ {
        self.nodes.iter().enumerate().filter(move |(_, n)| n.forker == Some(i)).map(|(k, _)| k)
    }
}

struct Builder<'a> {
    tasks: &'a [TaskImage],
    apart: bool,
    children: HashMap<i32, Vec<usize>>,
    /// Session of each task, with the caller's own put in for the one that the root inherits.
    sid: Vec<i32>,
    required: Vec<Option<i32>>,
    forest: Forest,
    node_of_task: HashMap<usize, usize>,
}

/// Plans all forks. With `shell_job` a tree that does not lead its session joins the caller's. With `apart` no child is
/// forked once its parent has its memory.
pub fn build(tasks: &[TaskImage], shell_job: bool, apart: bool) -> Result<Forest, ResourceError> {
    let root = &tasks[0].tree;
    if root.sid != root.pid && !shell_job {
        return Err(invalid!(
            "the root task (pid {}) does not lead its session {}; restore it with --shell-job",
            root.pid,
            root.sid
        ));
    }
    let mut children: HashMap<i32, Vec<usize>> = HashMap::new();
    for (i, t) in tasks.iter().enumerate().skip(1) {
        children.entry(t.tree.ppid as i32).or_default().push(i);
    }
    let sid = tasks.iter().map(|t| t.tree.sid as i32).collect();
    let n = tasks.len();
    let mut b = Builder {
        tasks,
        apart,
        children,
        sid,
        required: vec![None; n],
        forest: Forest::default(),
        node_of_task: HashMap::new(),
    };
    for i in (0..n).rev() {
        b.required[i] = b.birth_session(i)?;
    }
    b.add_tasks()?;
    b.add_group_helpers()?;
    Ok(b.forest)
}

impl Builder<'_> {
    fn kids(&self, i: usize) -> &[usize] {
        self.children.get(&self.tasks[i].pid()).map_or(&[], Vec::as_slice)
    }

    /// The session a task must be born in; `None` if any will do. Children come after their parents in the image.
    fn birth_session(&self, i: usize) -> Result<Option<i32>, ResourceError> {
        let pid = self.tasks[i].pid();
        if self.sid[i] != pid {
            return Ok(Some(self.sid[i]));
        }
        let mut early: HashSet<i32> = self.kids(i).iter().filter_map(|k| self.required[*k]).collect();
        early.remove(&self.sid[i]);
        // Several cannot all be inherited: all but one are made by siblings or helpers (see `add_children`).
        let alive: HashSet<i32> = self.tasks.iter().map(|t| t.pid()).collect();
        let mut early: Vec<i32> = early.into_iter().filter(|s| alive.contains(s)).collect();
        early.sort_unstable();
        Ok(early.first().copied().filter(|_| i != 0))
    }

    fn push(&mut self, node: Node) -> usize {
        if let Some(t) = node.task {
            self.node_of_task.insert(t, self.forest.nodes.len());
        }
        self.forest.nodes.push(node);
        self.forest.nodes.len() - 1
    }

    fn add_tasks(&mut self) -> Result<(), ResourceError> {
        let root = self.task_node(0, None);
        self.push(root);
        let mut todo = vec![0];
        while let Some(i) = todo.pop() {
            self.add_children(i)?;
            todo.extend(self.kids(i).iter().rev());
        }
        Ok(())
    }

    fn task_node(&self, i: usize, forker: Option<usize>) -> Node {
        let t = &self.tasks[i];
        let pid = t.pid();
        let pgid = t.tree.pgid as i32;
        let setsid = self.sid[i] == pid;
        let root_group = self.tasks[0].tree.pgid as i32;
        let outside = root_group != self.tasks[0].pid() && pgid == root_group;
        Node {
            pid,
            task: Some(i),
            forker,
            as_sibling: false,
            after_memory: false,
            before_setsid: false,
            setsid,
            pgid: if (setsid && pgid == pid) || outside { None } else { Some(pgid) },
            reaper: None,
        }
    }

    fn add_children(&mut self, i: usize) -> Result<(), ResourceError> {
        let me = self.node_of_task[&i];
        let born = if i == 0 { None } else { self.required[i] };
        let leads = self.forest.nodes[me].setsid;
        let mut elsewhere = Vec::new();
        for k in self.kids(i).to_vec() {
            let mut node = self.task_node(k, Some(me));
            node.after_memory = !self.apart && shares_memory(&self.tasks[k], &self.tasks[i]);
            node.reaper = self.tasks[k].is_zombie().then_some(me);
            match self.required[k] {
                None => {}
                Some(s) if s == self.sid[i] => {}
                Some(s) if leads && Some(s) == born => node.before_setsid = true,
                Some(s) => {
                    elsewhere.push((node, k, s));
                    continue;
                }
            }
            self.push(node);
        }
        for (mut node, k, s) in elsewhere {
            let maker = self.maker_in_session(me, i, s)?;
            node.forker = Some(maker);
            node.as_sibling = true;
            let maker = self.forest.nodes[maker].task.filter(|_| !self.apart);
            node.after_memory = maker.is_some_and(|m| shares_memory(&self.tasks[k], &self.tasks[m]));
            self.push(node);
        }
        Ok(())
    }

    /// A child of `me` that is in session `s` and can make siblings there: one of the tree, or a helper.
    fn maker_in_session(&mut self, me: usize, i: usize, s: i32) -> Result<usize, ResourceError> {
        let siblings: Vec<usize> = self.forest.forked_by(me).collect();
        for n in siblings {
            let node = &self.forest.nodes[n];
            let lives = node.task.is_none_or(|t| !self.tasks[t].is_zombie());
            let in_session =
                node.pid == s && node.setsid || node.task.is_some_and(|t| self.sid[t] == s && !node.setsid);
            if lives && in_session {
                return Ok(n);
            }
        }
        let taken = self.tasks.iter().any(|t| t.pid() == s || t.threads.iter().any(|(tid, _)| *tid == s));
        if taken {
            return Err(invalid!(
                "pid {}: a child of it is in session {s}, whose leader is elsewhere in the tree; this cannot be restored yet",
                self.tasks[i].pid()
            ));
        }
        Ok(self.push(Node {
            pid: s,
            task: None,
            forker: Some(me),
            as_sibling: false,
            after_memory: false,
            before_setsid: false,
            setsid: true,
            pgid: None,
            reaper: Some(me),
        }))
    }

    /// Groups whose leader is gone get a helper with its pid, made by a member, which also waits for it.
    fn add_group_helpers(&mut self) -> Result<(), ResourceError> {
        let pids: HashSet<i32> = self.forest.nodes.iter().map(|n| n.pid).collect();
        let mut groups: BTreeMap<i32, usize> = BTreeMap::new();
        for (k, n) in self.forest.nodes.iter().enumerate() {
            let lives = n.task.is_some_and(|t| !self.tasks[t].is_zombie());
            if let Some(g) = n.pgid.filter(|g| !pids.contains(g)) {
                let first = groups.entry(g).or_insert(k);
                if lives && self.forest.nodes[*first].task.is_some_and(|t| self.tasks[t].is_zombie()) {
                    *first = k;
                }
            }
        }
        for (pgid, member) in groups {
            let t = self.forest.nodes[member].task.expect("only tasks name groups");
            // The dead fork nobody: theirs is made where they are made.
            let member = match self.forest.nodes[member].forker.filter(|_| self.tasks[t].is_zombie()) {
                Some(forker) => forker,
                None => member,
            };
            self.push(Node {
                pid: pgid,
                task: None,
                forker: Some(member),
                as_sibling: false,
                after_memory: false,
                before_setsid: false,
                setsid: false,
                pgid: Some(pgid),
                reaper: Some(member),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{TASK_ALIVE, TASK_DEAD};
    use dormouse_images::pb;

    /// A task without memory: pid, parent, group, session, dead?
    fn task((pid, ppid, pgid, sid, dead): (u32, u32, u32, u32, bool)) -> TaskImage {
        let state = if dead { TASK_DEAD } else { TASK_ALIVE };
        let tc = pb::TaskCoreEntry { task_state: state, ..Default::default() };
        TaskImage {
            tree: pb::PstreeEntry { pid, ppid, pgid, sid, threads: vec![pid] },
            core: pb::CoreEntry { tc: Some(tc), ..Default::default() },
            threads: vec![],
            ids: None,
            mm: None,
            fds: vec![],
            fs: None,
            pages: None,
        }
    }

    fn forest(tasks: &[(u32, u32, u32, u32, bool)]) -> Forest {
        let tasks: Vec<TaskImage> = tasks.iter().copied().map(task).collect();
        build(&tasks, false, false).expect("a tree that can be restored")
    }

    /// Plays the plan: what every process's parent, group and session would be.
    fn play(f: &Forest) -> BTreeMap<i32, (i32, i32, i32)> {
        let mut state: Vec<(i32, i32, i32)> = vec![(0, 0, 0); f.nodes.len()];
        let mut done = vec![false; f.nodes.len()];
        fn run(f: &Forest, i: usize, born: (i32, i32, i32), state: &mut [(i32, i32, i32)], done: &mut [bool]) {
            assert!(!std::mem::replace(&mut done[i], true), "forked twice");
            let n = &f.nodes[i];
            state[i] = born;
            let child = |k: usize, state: &[(i32, i32, i32)]| {
                let parent = if f.nodes[k].as_sibling { state[i].0 } else { n.pid };
                (parent, state[i].1, state[i].2)
            };
            let kids: Vec<usize> = f.forked_by(i).collect();
            for &k in kids.iter().filter(|k| f.nodes[**k].before_setsid) {
                run(f, k, child(k, state), state, done);
            }
            if n.setsid {
                (state[i].1, state[i].2) = (n.pid, n.pid);
            }
            if n.pgid == Some(n.pid) {
                state[i].1 = n.pid;
            }
            for &k in kids.iter().filter(|k| !f.nodes[**k].before_setsid) {
                run(f, k, child(k, state), state, done);
            }
        }
        run(f, 0, (1, 7, 7), &mut state, &mut done);
        assert!(done.iter().all(|d| *d), "somebody is never forked");
        let leaders: Vec<(i32, i32)> = state.iter().zip(&f.nodes).map(|(s, n)| (n.pid, s.2)).collect();
        for (i, n) in f.nodes.iter().enumerate() {
            if let Some(g) = n.pgid.filter(|g| *g != n.pid) {
                let session = leaders.iter().find(|(pid, _)| *pid == g).expect("a group has a leader or a helper").1;
                assert_eq!(session, state[i].2, "pid {} cannot join group {g} of another session", n.pid);
                state[i].1 = g;
            }
        }
        f.nodes.iter().zip(state).filter(|(n, _)| n.task.is_some()).map(|(n, s)| (n.pid, s)).collect()
    }

    fn check(tasks: &[(u32, u32, u32, u32, bool)]) {
        let got = play(&forest(tasks));
        for (pid, ppid, pgid, sid, _) in tasks {
            let parent = if *ppid == 0 { 1 } else { *ppid as i32 };
            assert_eq!(got[&(*pid as i32)], (parent, *pgid as i32, *sid as i32), "pid {pid}");
        }
    }

    #[test]
    fn a_plain_tree_keeps_parents_groups_and_sessions() {
        check(&[(10, 0, 10, 10, false), (11, 10, 11, 10, false), (12, 11, 11, 10, false), (13, 10, 13, 13, false)]);
    }

    #[test]
    fn a_session_leader_s_child_may_stay_in_the_old_session() {
        check(&[(10, 0, 10, 10, false), (11, 10, 11, 11, false), (12, 11, 10, 10, false), (13, 11, 11, 11, false)]);
    }

    #[test]
    fn a_session_whose_leader_is_gone_is_led_by_a_helper() {
        check(&[(10, 0, 10, 10, false), (12, 10, 11, 11, false), (13, 10, 13, 11, false)]);
    }

    #[test]
    fn a_group_whose_leader_is_gone_is_led_by_a_helper() {
        check(&[(10, 0, 10, 10, false), (12, 10, 11, 10, false), (13, 12, 11, 10, false)]);
    }

    #[test]
    fn a_zombie_leads_its_group_until_all_have_joined() {
        check(&[(10, 0, 10, 10, false), (11, 10, 11, 10, true), (12, 10, 11, 10, false)]);
    }

    #[test]
    fn a_group_of_zombies_alone_is_led_by_a_helper() {
        check(&[(10, 0, 10, 10, false), (12, 10, 11, 10, true), (13, 10, 11, 10, true)]);
    }

    #[test]
    fn a_foreign_session_needs_the_users_consent() {
        let tasks = [task((10, 0, 10, 5, false))];
        assert!(build(&tasks, false, false).is_err_and(|e| e.to_string().contains("--shell-job")));
        assert!(build(&tasks, true, false).is_ok());
    }
}
