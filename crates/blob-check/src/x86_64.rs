//! x86_64 read back: frames and calls, and no instruction that needs what a foreign process did not offer.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::code::{Body, Call};
use crate::image::Image;

/// What an instruction may require of the processor: the integer set. Everything else is a vector, x87, mask or
/// state instruction, or too new to be taken for granted.
const ALLOWED: [CpuidFeature; 15] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CPUID,
    CpuidFeature::SYSCALL,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CET_IBT,
];

/// Decodes one function and returns the number of its instructions.
pub(crate) fn decode(
    bytes: &[u8],
    base: u64,
    image: &Image,
    body: &mut Body,
    refuse: &mut dyn FnMut(u64, String),
) -> usize {
    let end = base + bytes.len() as u64;
    let all: Vec<Instruction> = Decoder::with_ip(64, bytes, base, DecoderOptions::NONE).iter().collect();
    for (i, insn) in all.iter().enumerate() {
        let at = insn.ip();
        if insn.is_invalid() {
            refuse(at, "not an instruction".into());
            continue;
        }
        if let Some(why) = foreign(insn) {
            refuse(at, why);
        }
        if insn.mnemonic() == Mnemonic::Syscall {
            body.syscalls.push(at);
        }
        if let Err(why) = stack(insn, body) {
            refuse(at, why);
        }
        if let Err(why) = flow(&all, i, base..end, image, body) {
            refuse(at, why);
        }
    }
    all.len()
}

/// Why an instruction has no place in a blob.
fn foreign(insn: &Instruction) -> Option<String> {
    let fence = matches!(insn.mnemonic(), Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence);
    let unknown = insn.cpuid_features().iter().find(|f| !ALLOWED.contains(f));
    if let (Some(feature), false) = (unknown, fence) {
        return Some(format!("{:?} needs {feature:?}; blobs use the integer instructions alone", insn.mnemonic()));
    }
    if matches!(
        insn.mnemonic(),
        Mnemonic::Int
            | Mnemonic::Into
            | Mnemonic::Sysenter
            | Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Hlt
            | Mnemonic::Iretq
    ) {
        return Some(format!("{:?} has no use in a blob", insn.mnemonic()));
    }
    for op in 0..insn.op_count() {
        match insn.op_kind(op) {
            OpKind::Register => {
                let r = insn.op_register(op);
                if !r.is_gpr() {
                    return Some(format!("register {r:?} is not one of the general ones"));
                }
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                return Some("a far branch has an absolute target".into());
            }
            OpKind::Memory => {
                if insn.segment_prefix() == Register::FS || insn.segment_prefix() == Register::GS {
                    return Some(format!("{:?} reaches thread-local storage of the process", insn.mnemonic()));
                }
                let indexed = insn.memory_index() != Register::None;
                let absolute = insn.memory_base() == Register::None && insn.memory_displacement64() != 0;
                // `lea` with an index and no base is arithmetic.
                if absolute && !(insn.mnemonic() == Mnemonic::Lea && indexed) {
                    return Some(format!("{:?} has an absolute address as operand", insn.mnemonic()));
                }
                if insn.memory_base() == Register::EIP {
                    return Some("an address relative to eip is cut to 32 bits".into());
                }
            }
            _ => {}
        }
    }
    None
}

/// Adds what the instruction takes from the stack. Every path is summed, so the frame is an upper bound.
fn stack(insn: &Instruction, body: &mut Body) -> Result<(), String> {
    match insn.mnemonic() {
        Mnemonic::Push | Mnemonic::Pushfq => body.frame += 8,
        Mnemonic::Pop if insn.op0_register() == Register::RSP => {
            return Err("the stack pointer is popped".into());
        }
        Mnemonic::Pop | Mnemonic::Popfq => {}
        Mnemonic::Enter | Mnemonic::Leave => {
            return Err("a frame pointer would hide the frame's size".into());
        }
        m if insn.op0_kind() == OpKind::Register && insn.op0_register().full_register() == Register::RSP => {
            match m {
                Mnemonic::Sub | Mnemonic::Add if is_immediate(insn) => {
                    let amount = insn.immediate(1) as i64;
                    let taken = if m == Mnemonic::Sub { amount } else { -amount };
                    body.frame += taken.max(0) as u64;
                }
                Mnemonic::And if is_immediate(insn) => body.frame += !insn.immediate(1),
                Mnemonic::Lea if insn.memory_base() == Register::RSP && insn.memory_index() == Register::None => {
                    body.frame += (insn.memory_displacement64() as i64).saturating_neg().max(0) as u64;
                }
                // To a signal frame that the host prepared: nothing of ours is stored there.
                Mnemonic::Mov if insn.op1_kind() == OpKind::Register => body.stack_switches += 1,
                Mnemonic::Cmp | Mnemonic::Test => {}
                _ => {
                    return Err(format!("{m:?} changes the stack pointer by an amount that is not in the code"));
                }
            }
        }
        _ => {}
    }
    Ok(())
}

fn is_immediate(insn: &Instruction) -> bool {
    matches!(insn.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64)
}

/// Follows calls and jumps.
fn flow(
    all: &[Instruction],
    i: usize,
    own: std::ops::Range<u64>,
    image: &Image,
    body: &mut Body,
) -> Result<(), String> {
    let insn = &all[i];
    match insn.flow_control() {
        FlowControl::Call if insn.mnemonic() == Mnemonic::Syscall => {}
        FlowControl::Call => {
            body.calls.push(Call { to: insn.near_branch_target(), pushes: 8, tail: false });
        }
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
            let to = insn.near_branch_target();
            if !own.contains(&to) {
                body.calls.push(Call { to, pushes: 0, tail: true });
            } else if !all.iter().any(|other| other.ip() == to) {
                return Err(format!("a jump to {to:#x}, into the middle of an instruction"));
            }
        }
        FlowControl::IndirectCall => {
            if let Some(to) = through_word(insn, image) {
                body.calls.push(Call { to, pushes: 8, tail: false });
            } else if all.get(i + 1).is_some_and(|next| next.mnemonic() == Mnemonic::Ud2) {
                // clone3's child: it begins on a stack of its own and never comes back.
                body.stack_switches += 1;
            } else {
                return Err("a call through a register: its stack cannot be bounded".into());
            }
        }
        FlowControl::IndirectBranch => {
            if let Some(to) = through_word(insn, image) {
                body.calls.push(Call { to, pushes: 0, tail: true });
            } else if !is_table_jump(all, i) {
                return Err("a jump through a register that is no jump table".into());
            }
        }
        FlowControl::XbeginXabortXend => return Err("a transaction".into()),
        FlowControl::Next | FlowControl::Return | FlowControl::Interrupt | FlowControl::Exception => {}
    }
    Ok(())
}

/// The function that a word of the image, given by its address relative to rip, points to once relocated.
fn through_word(insn: &Instruction, image: &Image) -> Option<u64> {
    if insn.op0_kind() != OpKind::Memory || !insn.is_ip_rel_memory_operand() {
        return None;
    }
    let at = insn.ip_rel_memory_address();
    image.relocations.iter().find(|(offset, _)| *offset == at).map(|(_, addend)| *addend)
}

/// A jump table of relative entries ends in `add reg, table; jmp reg`.
fn is_table_jump(all: &[Instruction], i: usize) -> bool {
    let reg = all[i].op0_register();
    all[i].op0_kind() == OpKind::Register
        && all[i.saturating_sub(3)..i].iter().any(|p| p.mnemonic() == Mnemonic::Add && p.op0_register() == reg)
}

/// Whether bytes between functions are filler.
pub(crate) fn is_padding(bytes: &[u8], base: u64) -> bool {
    bytes.iter().all(|&b| b == 0)
        || Decoder::with_ip(64, bytes, base, DecoderOptions::NONE)
            .iter()
            .all(|i| matches!(i.mnemonic(), Mnemonic::Int3 | Mnemonic::Nop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arch;

    fn decoded(code: &[u8]) -> (Body, Vec<String>) {
        let image = Image {
            arch: Arch::X86_64,
            bytes: Vec::new(),
            memory_size: 0x1000,
            relocations: vec![(0x800, 0x40)],
            entry: 0,
            text: 0..0x1000,
            functions: Vec::new(),
        };
        let (mut body, mut refused) = (Body::default(), Vec::new());
        decode(code, 0x100, &image, &mut body, &mut |at, what| refused.push(format!("{at:#x}: {what}")));
        (body, refused)
    }

    #[test]
    fn frames_are_summed() {
        // push rbx; push r12; sub rsp, 0x48; add rsp, 0x48; pop r12; pop rbx; ret
        let (body, refused) =
            decoded(&[0x53, 0x41, 0x54, 0x48, 0x83, 0xec, 0x48, 0x48, 0x83, 0xc4, 0x48, 0x41, 0x5c, 0x5b, 0xc3]);
        assert_eq!((body.frame, refused.len()), (8 + 8 + 0x48, 0));
    }

    #[test]
    fn vector_x87_and_thread_instructions_are_refused() {
        let cases: [&[u8]; 6] = [
            &[0x0f, 0x57, 0xc0],                                     // xorps xmm0, xmm0
            &[0xd9, 0xe8],                                           // fld1
            &[0xc5, 0xf8, 0x57, 0xc0],                               // vxorps
            &[0x64, 0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x00, 0x00], // mov rax, fs:[0]
            &[0x0f, 0xae, 0x00],                                     // fxsave [rax]
            &[0x0f, 0x01, 0xee],                                     // rdpkru
        ];
        for code in cases {
            assert_eq!(decoded(code).1.len(), 1, "{code:x?}: {:?}", decoded(code).1);
        }
    }

    #[test]
    fn absolute_addresses_are_refused() {
        // mov eax, [0x12345678]; mov rax, [rcx*8 + 0x1000]; lea eax, [rcx*4 + 3] is arithmetic
        assert_eq!(decoded(&[0x8b, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12]).1.len(), 1);
        assert_eq!(decoded(&[0x48, 0x8b, 0x04, 0xcd, 0x00, 0x10, 0x00, 0x00]).1.len(), 1);
        assert_eq!(decoded(&[0x8d, 0x04, 0x8d, 0x03, 0x00, 0x00, 0x00]).1.len(), 0);
    }

    #[test]
    fn a_call_through_a_relocated_word_is_followed() {
        // call [rip + 0x6fa] at 0x100 reads the word at 0x800
        let (body, refused) = decoded(&[0xff, 0x15, 0xfa, 0x06, 0x00, 0x00]);
        assert_eq!((body.calls.len(), body.calls[0].to, refused.len()), (1, 0x40, 0));
    }

    #[test]
    fn a_call_through_a_register_is_refused_unless_it_is_a_childs_first() {
        // call r13; nop, and call r13; ud2
        assert_eq!(decoded(&[0x41, 0xff, 0xd5, 0x90]).1.len(), 1);
        assert_eq!(decoded(&[0x41, 0xff, 0xd5, 0x0f, 0x0b]).1.len(), 0);
    }

    #[test]
    fn a_stack_pointer_of_unknown_size_is_refused() {
        // sub rsp, rax; pop rsp
        assert_eq!(decoded(&[0x48, 0x29, 0xc4]).1.len(), 1);
        assert_eq!(decoded(&[0x5c]).1.len(), 1);
    }

    #[test]
    fn a_jump_into_an_instruction_is_refused() {
        // jmp -1 (into itself)
        assert_eq!(decoded(&[0xeb, 0xff, 0x90]).1.len(), 1);
    }
}
