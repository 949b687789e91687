//! A way back that needs no dumper: a few instructions in the vDSO's padding that give a thread its registers again.
//!
//! The first injected system call maps the parasite's memory, the last one unmaps it. A dumper that is killed in
//! between leaves a thread that runs on with registers that are not its own. So both calls are made from a stub which
//! goes on, by itself, to undo the mapping, the signal mask and the registers; as long as the dumper lives, it stops
//! the thread before that. The stub lies in the zeroes between the end of the vDSO's ELF image and the end of its
//! page, written through `/proc/PID/mem` (which copies the page, as for a breakpoint), and is zeroed again at the end.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dormouse_kernel::HostPid;

use crate::arch;
use crate::ptrace::State;

/// A stub in a target.
#[derive(Debug)]
pub struct Stub {
    memory: File,
    at: u64,
    code: imp::Code,
}

impl Stub {
    /// Writes a stub for a thread with this state into the padding of `vdso`; `map_len` is the length of the mapping that
    /// it will undo. `None` where there is no room, or for an architecture that cannot do it.
    ///
    /// # Errors
    /// The target's memory cannot be read or written.
    pub fn place(pid: HostPid, vdso: Option<&Range<u64>>, state: &State, map_len: u64) -> io::Result<Option<Self>> {
        let Some(vdso) = vdso else { return Ok(None) };
        let Some(code) = imp::Code::new(state, map_len) else { return Ok(None) };
        let memory = File::options().read(true).write(true).open(pid.proc_path("mem"))?;
        let need = code.bytes.len() as u64 + 16;
        if vdso.end - vdso.start < need {
            return Ok(None);
        }
        let at = (vdso.end - need) & !15;
        let mut room = vec![0; (vdso.end - at) as usize];
        memory.read_exact_at(&mut room, at)?;
        // A dumper that was killed has left its own stub there.
        let own = room.starts_with(code.instructions()) && room[code.bytes.len()..].iter().all(|b| *b == 0);
        if !own && room.iter().any(|b| *b != 0) {
            return Ok(None);
        }
        if (at..vdso.end).contains(&arch::pc(&state.regs)) {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "it still recovers from a dump that was killed; retry",
            ));
        }
        memory.write_all_at(&code.bytes, at)?;
        Ok(Some(Self { memory, at, code }))
    }

    /// Address of the system-call instruction for mmap(2); behind it the new mapping is undone.
    pub fn map_call(&self) -> u64 {
        self.at
    }

    /// Address of the system-call instruction for close(2); behind it the mapping is undone.
    pub fn close_call(&self) -> u64 {
        self.at + self.code.close
    }

    /// Address from which the mapping is undone.
    pub fn unmap(&self) -> u64 {
        self.at + self.code.unmap
    }

    /// Says where the mapping lies.
    ///
    /// # Errors
    /// The target is gone.
    pub fn set_base(&self, base: u64) -> io::Result<()> {
        self.memory.write_all_at(&base.to_ne_bytes(), self.at + self.code.base)
    }

    /// Zeroes the stub; no thread is in it any more.
    ///
    /// # Errors
    /// The target is gone.
    pub fn remove(&self) -> io::Result<()> {
        self.memory.write_all_at(&vec![0; self.code.bytes.len()], self.at)
    }
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use crate::arch;
    use crate::ptrace::State;

    /// The stub's bytes, and offsets in them.
    #[derive(Debug)]
    pub struct Code {
        pub bytes: Vec<u8>,
        pub close: u64,
        pub unmap: u64,
        pub base: u64,
        literals: usize,
    }

    const SYSCALL: &[u8] = &[0x0f, 0x05];

    /// Code that refers to literals behind it by rip-relative addresses.
    struct Assembler {
        bytes: Vec<u8>,
        /// Where a displacement is to be put, and which literal it refers to.
        uses: Vec<(usize, usize)>,
        literals: Vec<u64>,
    }

    impl Assembler {
        fn put(&mut self, bytes: &[u8]) {
            self.bytes.extend_from_slice(bytes);
        }

        /// An instruction that ends in a 32-bit displacement to a new literal.
        fn load(&mut self, opcode: &[u8], literal: u64) -> usize {
            self.literals.push(literal);
            self.refer(opcode, self.literals.len() - 1);
            self.literals.len() - 1
        }

        fn refer(&mut self, opcode: &[u8], literal: usize) {
            self.put(opcode);
            self.uses.push((self.bytes.len(), literal));
            self.put(&[0; 4]);
        }

        /// Code and literals; offsets of the literals.
        fn finish(mut self) -> (Vec<u8>, Vec<u64>) {
            let start = self.bytes.len().next_multiple_of(8);
            self.bytes.resize(start, 0xcc);
            for (at, literal) in self.uses {
                let displacement = (start + literal * 8) as i32 - (at as i32 + 4);
                self.bytes[at..at + 4].copy_from_slice(&displacement.to_le_bytes());
            }
            let offsets = (0..self.literals.len()).map(|i| (start + i * 8) as u64).collect();
            for l in self.literals {
                self.bytes.extend_from_slice(&l.to_le_bytes());
            }
            (self.bytes, offsets)
        }
    }

    impl Code {
        /// No instruction here changes the flags: `syscall` puts them back, `mov` and `lea` leave them alone.
        pub fn new(state: &State, map_len: u64) -> Option<Self> {
            let r = arch::resumed(&state.regs);
            let mut a = Assembler { bytes: vec![], uses: vec![], literals: vec![] };
            a.put(SYSCALL); // mmap; its result is what is unmapped (an error is no mapping, which munmap refuses)
            a.put(&[0x48, 0x89, 0xc7]); // mov rdi, rax
            a.put(&[0xeb, 0x09]); // jmp over the next two instructions
            let close = a.bytes.len() as u64;
            a.put(SYSCALL); // close
            let unmap = a.bytes.len() as u64;
            let base = a.load(&[0x48, 0x8b, 0x3d], 0); // mov rdi, [base]
            a.load(&[0x48, 0x8b, 0x35], map_len); // mov rsi, [length]
            a.put(&[0xb8, 11, 0, 0, 0]); // mov eax, munmap
            a.put(SYSCALL);
            a.put(&[0xbf, 2, 0, 0, 0]); // mov edi, SIG_SETMASK
            a.load(&[0x48, 0x8d, 0x35], state.sigmask); // lea rsi, [mask]
            a.put(&[0xba, 0, 0, 0, 0]); // mov edx, 0
            a.put(&[0x41, 0xba, 8, 0, 0, 0]); // mov r10d, 8
            a.put(&[0xb8, 14, 0, 0, 0]); // mov eax, rt_sigprocmask
            a.put(SYSCALL);
            let registers: [(&[u8], u64); 9] = [
                (&[0x48, 0x8b, 0x3d], r.rdi),
                (&[0x48, 0x8b, 0x35], r.rsi),
                (&[0x48, 0x8b, 0x15], r.rdx),
                (&[0x4c, 0x8b, 0x15], r.r10),
                (&[0x4c, 0x8b, 0x05], r.r8),
                (&[0x4c, 0x8b, 0x0d], r.r9),
                (&[0x48, 0x8b, 0x05], r.rax),
                (&[0x48, 0x8b, 0x0d], r.rcx),
                (&[0x4c, 0x8b, 0x1d], r.r11),
            ];
            for (opcode, value) in registers {
                a.load(opcode, value);
            }
            a.load(&[0xff, 0x25], r.rip); // jmp [pc]
            let (bytes, offsets) = a.finish();
            Some(Self { bytes, close, unmap, base: offsets[base], literals: offsets[0] as usize })
        }

        /// The part that is the same for every thread.
        pub fn instructions(&self) -> &[u8] {
            &self.bytes[..self.literals]
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod imp {
    use crate::ptrace::State;

    /// Never made: no instruction of this architecture restores the program counter without another register's help.
    #[derive(Debug)]
    pub struct Code {
        pub bytes: Vec<u8>,
        pub close: u64,
        pub unmap: u64,
        pub base: u64,
    }

    impl Code {
        pub fn new(_: &State, _: u64) -> Option<Self> {
            None
        }

        pub fn instructions(&self) -> &[u8] {
            &self.bytes
        }
    }
}
