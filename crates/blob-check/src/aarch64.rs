//! aarch64 read back: frames and calls out of the fixed-width encoding, and no vector or floating-point instruction.

use crate::code::{Body, Call};

const SP: u32 = 31;

/// Decodes one function and returns the number of its instructions.
pub(crate) fn decode(bytes: &[u8], base: u64, body: &mut Body, refuse: &mut dyn FnMut(u64, String)) -> usize {
    let words: Vec<u32> = bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect();
    let end = base + bytes.len() as u64;
    for (i, &w) in words.iter().enumerate() {
        let at = base + 4 * i as u64;
        if let Some(what) = foreign(w) {
            refuse(at, format!("{what} ({w:08x}); blobs use the integer instructions alone"));
        }
        if w & 0xffe0_001f == 0xd400_0001 {
            body.syscalls.push(at);
        }
        if let Err(what) = stack(w, body) {
            refuse(at, what);
        }
        if let Err(what) = flow(&words, i, at, base..end, body) {
            refuse(at, what);
        }
    }
    if !bytes.len().is_multiple_of(4) {
        refuse(end, "a part of an instruction".into());
    }
    words.len()
}

/// The top-level encoding groups of the architecture manual (bits 28..25): what is not integer code.
fn foreign(w: u32) -> Option<&'static str> {
    match (w >> 25) & 15 {
        0b0000 if w >> 16 == 0 => Some("a permanently undefined instruction"),
        0b0000 | 0b0001 | 0b0011 => Some("a matrix or reserved instruction"),
        0b0010 => Some("a scalable-vector instruction"),
        0b0111 | 0b1111 => Some("a vector or floating-point instruction"),
        0b0100 | 0b0110 | 0b1100 | 0b1110 if w & (1 << 26) != 0 => Some("a load or store of a vector register"),
        // mrs and msr of tpidr_el0, the thread pointer.
        _ if w & 0xffdf_ffe0 == 0xd51b_d040 => Some("thread-local storage of the process"),
        _ => None,
    }
}

/// Adds what the instruction takes from the stack. Every path is summed, so the frame is an upper bound.
fn stack(w: u32, body: &mut Body) -> Result<(), String> {
    let (rd, rn) = (w & 31, (w >> 5) & 31);
    let sets_flags = w & (1 << 29) != 0;
    // add/sub (immediate), 64 bits: `sub sp, sp, #imm{, lsl #12}`; `mov sp, xN` is `add sp, xN, #0`.
    if w & 0x9f80_0000 == 0x9100_0000 && !sets_flags && rd == SP {
        let amount = u64::from((w >> 10) & 0xfff) << if w & (1 << 22) != 0 { 12 } else { 0 };
        let subtracts = w & (1 << 30) != 0;
        match (rn == SP, subtracts, amount) {
            (true, true, _) => body.frame += amount,
            (true, false, _) => {}
            // To a signal frame that the host prepared: nothing of ours is stored there.
            (false, false, 0) => body.stack_switches += 1,
            (false, ..) => return Err("the stack pointer is computed from another register".into()),
        }
        return Ok(());
    }
    // add/sub (extended register) and and/orr/eor (immediate) can write sp too.
    let extended = w & 0x9fe0_0000 == 0x8b20_0000 && !sets_flags;
    let logical = w & 0x9f80_0000 == 0x9200_0000 && (w >> 29) & 3 != 3;
    if (extended || logical) && rd == SP {
        return Err("the stack pointer changes by an amount that is not in the code".into());
    }
    // Pairs and single registers with write-back to sp.
    let pair_writeback = w & 0x3a00_0000 == 0x2800_0000 && w & (1 << 23) != 0;
    if pair_writeback && rn == SP {
        let scale = if w >> 31 != 0 { 3 } else { 2 };
        let offset = i64::from(((w >> 15) & 0x7f) as i32) << 57 >> 57 << scale;
        body.frame += (-offset).max(0) as u64;
    }
    let single_writeback = w & 0x3b20_0400 == 0x3800_0400;
    if single_writeback && rn == SP {
        let offset = i64::from((w >> 12) & 0x1ff) << 55 >> 55;
        body.frame += (-offset).max(0) as u64;
    }
    Ok(())
}

/// Follows branches.
fn flow(words: &[u32], i: usize, at: u64, own: std::ops::Range<u64>, body: &mut Body) -> Result<(), String> {
    let w = words[i];
    let relative = |bits: u32, shift: u32| {
        let field = i64::from(w >> shift) & ((1 << bits) - 1);
        at.wrapping_add_signed(field << (64 - bits) >> (64 - bits) << 2)
    };
    let jump = if w & 0xfc00_0000 == 0x9400_0000 {
        body.calls.push(Call { to: relative(26, 0), pushes: 0, tail: false });
        return Ok(());
    } else if w & 0xfc00_0000 == 0x1400_0000 {
        relative(26, 0)
    } else if w & 0xff00_0000 == 0x5400_0000 || w & 0x7e00_0000 == 0x3400_0000 {
        relative(19, 5)
    } else if w & 0x7e00_0000 == 0x3600_0000 {
        relative(14, 5)
    } else if w & 0xffff_fc1f == 0xd63f_0000 {
        // clone3's child, before `brk`: it begins on a stack of its own and never comes back.
        if words.get(i + 1).is_some_and(|next| next & 0xffe0_001f == 0xd420_0000) {
            body.stack_switches += 1;
            return Ok(());
        }
        return Err("a call through a register: its stack cannot be bounded".into());
    } else if w & 0xffff_fc1f == 0xd61f_0000 {
        return if is_table_jump(words, i) {
            Ok(())
        } else {
            Err("a jump through a register that is no jump table".into())
        };
    } else {
        return Ok(());
    };
    if !own.contains(&jump) {
        body.calls.push(Call { to: jump, pushes: 0, tail: true });
    }
    Ok(())
}

/// A jump table of relative entries ends in `add xN, base, entry{, shift}; br xN`.
fn is_table_jump(words: &[u32], i: usize) -> bool {
    let reg = (words[i] >> 5) & 31;
    words[i.saturating_sub(3)..i].iter().any(|&p| p & 0x7f00_0000 == 0x0b00_0000 && p & 31 == reg)
}

/// Whether bytes between functions are filler: zeros or `nop`.
pub(crate) fn is_padding(bytes: &[u8]) -> bool {
    bytes.chunks(4).all(|w| w.iter().all(|&b| b == 0) || *w == 0xd503_201f_u32.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(words: &[u32]) -> (Body, Vec<String>) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let (mut body, mut refused) = (Body::default(), Vec::new());
        decode(&bytes, 0x100, &mut body, &mut |at, what| refused.push(format!("{at:#x}: {what}")));
        (body, refused)
    }

    #[test]
    fn frames_are_summed() {
        // sub sp, sp, #0x40; stp x29, x30, [sp, #-32]!; str x19, [sp, #-16]!; sub sp, sp, #1, lsl #12;
        // ldp x29, x30, [sp], #32; add sp, sp, #0x40; ret
        let words = [0xd101_03ff, 0xa9be_7bfd, 0xf81f_0ff3, 0xd140_07ff, 0xa8c2_7bfd, 0x9101_03ff, 0xd65f_03c0];
        let (body, refused) = decoded(&words);
        assert_eq!((body.frame, refused.len()), (64 + 32 + 16 + 4096, 0));
    }

    #[test]
    fn calls_and_tail_calls_are_followed_and_loops_are_not_calls() {
        // bl +0x40; b -4; b -0x80; svc #0
        let (body, refused) = decoded(&[0x9400_0010, 0x17ff_ffff, 0x17ff_ffe0, 0xd400_0001]);
        let calls: Vec<_> = body.calls.iter().map(|c| (c.to, c.tail)).collect();
        assert_eq!(calls, [(0x140, false), (0x108 - 0x80, true)]);
        assert_eq!((body.syscalls, refused.len()), (vec![0x10c], 0));
    }

    #[test]
    fn vector_and_thread_pointer_instructions_are_refused() {
        // movi v0.2d, #0; str q0, [sp]; fadd d0, d0, d0; mrs x0, tpidr_el0; ptrue p0.b
        for w in [0x6f00_e400, 0x3d80_03e0, 0x1e60_2800, 0xd53b_d040, 0x2518_e3e0] {
            assert_eq!(decoded(&[w]).1.len(), 1, "{w:08x}");
        }
    }

    #[test]
    fn a_call_through_a_register_is_refused_unless_it_is_a_childs_first() {
        // blr x21; nop, and blr x21; brk #1
        assert_eq!(decoded(&[0xd63f_02a0, 0xd503_201f]).1.len(), 1);
        assert_eq!(decoded(&[0xd63f_02a0, 0xd420_0020]).1.len(), 0);
    }

    #[test]
    fn a_stack_pointer_of_unknown_size_is_refused() {
        // sub sp, sp, x0; and sp, x0, #-16
        assert_eq!(decoded(&[0xcb20_63ff]).1.len(), 1);
        assert_eq!(decoded(&[0x927c_ec1f]).1.len(), 1);
    }
}
