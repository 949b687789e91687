//! What reading the instructions back tells: frames, calls, system calls; and the deepest stack that follows.

use std::collections::BTreeMap;

use crate::image::{ENTRY, Finding, Image};
use crate::{Arch, aarch64, x86_64};

/// A call or a jump that leaves a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// Address that is called.
    pub to: u64,
    /// Bytes that the call itself pushes; a tail call pushes none and gives the caller's frame back first.
    pub pushes: u64,
    /// The caller's frame is gone by then.
    pub tail: bool,
}

/// What the decoder of an architecture saw in one function.
#[derive(Clone, Debug, Default)]
pub(crate) struct Body {
    /// Upper bound of the bytes that the function itself takes from the stack.
    pub frame: u64,
    /// Whom it calls.
    pub calls: Vec<Call>,
    /// Addresses of its system-call instructions.
    pub syscalls: Vec<u64>,
    /// Places that move to another stack (a signal frame) or start a child on its own.
    pub stack_switches: usize,
}

/// What the code of a blob amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Instructions decoded.
    pub instructions: usize,
    /// Functions that hold them.
    pub functions: usize,
    /// System-call instructions, each in a function of ours.
    pub syscalls: usize,
    /// Places where the stack pointer is set to a given address, or a child starts on a stack of its own.
    pub stack_switches: usize,
    /// Upper bound of the stack that the deepest chain of calls takes, in bytes.
    pub stack: u64,
    /// The chain that takes it, by symbol names.
    pub deepest: Vec<String>,
}

/// Decodes every function of `image`.
///
/// # Errors
/// Every instruction that a blob must not contain; recursion; bytes that are no instructions.
pub fn read(image: &Image) -> Result<Code, Vec<Finding>> {
    let mut findings = Vec::new();
    let mut bodies: BTreeMap<u64, Body> = BTreeMap::new();
    let mut instructions = 0;
    let mut covered = image.text.start;
    for function in &image.functions {
        if !image.text.contains(&function.range.start) || function.range.end > image.text.end {
            findings.push(format!("{} lies outside .text", function.name));
            continue;
        }
        if function.range.is_empty() {
            findings.push(format!("{} has no size and cannot be checked", function.name));
            continue;
        }
        if function.range.start < covered {
            findings.push(format!("{} overlaps the function before it", function.name));
            continue;
        }
        gap(image, covered, function.range.start, &mut findings);
        covered = function.range.end;
        let bytes = &image.bytes[function.range.start as usize..function.range.end as usize];
        let mut body = Body::default();
        let mut refuse = |at: u64, what: String| findings.push(format!("{} at {at:#x}: {what}", function.name));
        instructions += match image.arch {
            Arch::X86_64 => x86_64::decode(bytes, function.range.start, image, &mut body, &mut refuse),
            Arch::Aarch64 => aarch64::decode(bytes, function.range.start, &mut body, &mut refuse),
        };
        if function.name.contains("rust_begin_unwind") {
            // Without panicking code the optimiser leaves the handler out.
            findings.push("code that can panic: the process it runs in would end with it".to_owned());
        } else if !body.syscalls.is_empty() && !is_ours(&function.name) {
            findings.push(format!("{}: a system call outside our own code", function.name));
        }
        bodies.insert(function.range.start, body);
    }
    gap(image, covered, image.text.end, &mut findings);

    let graph = Graph { image, bodies: &bodies };
    let mut deepest = (0, Vec::new());
    for &root in bodies.keys() {
        match graph.depth(root, &mut Vec::new()) {
            Ok(found) if found.0 > deepest.0 => deepest = found,
            Ok(_) => {}
            Err(finding) if !findings.contains(&finding) => findings.push(finding),
            Err(_) => {}
        }
    }
    if !findings.is_empty() {
        return Err(findings);
    }
    Ok(Code {
        instructions,
        functions: bodies.len(),
        syscalls: bodies.values().map(|b| b.syscalls.len()).sum(),
        stack_switches: bodies.values().map(|b| b.stack_switches).sum(),
        stack: deepest.0,
        deepest: deepest.1,
    })
}

/// Bytes between functions must be padding: otherwise there is code that no symbol names and nobody has checked.
fn gap(image: &Image, from: u64, to: u64, findings: &mut Vec<Finding>) {
    let Some(bytes) = image.bytes.get(from as usize..to as usize) else {
        return;
    };
    let padding = match image.arch {
        Arch::X86_64 => x86_64::is_padding(bytes, from),
        Arch::Aarch64 => aarch64::is_padding(bytes),
    };
    if !padding {
        findings.push(format!("{from:#x}..{to:#x} in .text belongs to no function"));
    }
}

/// Whether a (mangled) name comes from one of our crates. Both manglings keep crate names readable.
fn is_ours(name: &str) -> bool {
    name == ENTRY || ["dormouse_sys", "dormouse_blob_abi", "8parasite", "8restorer"].iter().any(|c| name.contains(c))
}

struct Graph<'a> {
    image: &'a Image,
    bodies: &'a BTreeMap<u64, Body>,
}

impl Graph<'_> {
    /// The deepest stack from `at` on, with the chain that takes it. Graphs of a few dozen functions need no memory of
    /// what was already seen.
    fn depth(&self, at: u64, path: &mut Vec<u64>) -> Result<(u64, Vec<String>), Finding> {
        let name = self.name(at);
        let Some(body) = self.bodies.get(&at) else {
            return Err(format!("a call to {at:#x}, which is not the start of a function"));
        };
        if let Some(start) = path.iter().position(|&p| p == at) {
            let cycle: Vec<_> = path[start..].iter().map(|&p| self.name(p)).collect();
            return Err(format!("recursion, whose stack nobody can bound: {} -> {name}", cycle.join(" -> ")));
        }
        path.push(at);
        let mut best = (body.frame, vec![name.clone()]);
        for call in &body.calls {
            let (below, chain) = self.depth(call.to, path)?;
            let total = if call.tail { below.max(body.frame) } else { body.frame + call.pushes + below };
            if total > best.0 {
                best = (total, std::iter::once(name.clone()).chain(chain).collect());
            }
        }
        path.pop();
        Ok(best)
    }

    fn name(&self, at: u64) -> String {
        let found = self.image.functions.iter().find(|f| f.range.start == at);
        found.map_or_else(|| format!("{at:#x}"), |f| f.name.clone())
    }
}
