"""bench/gpu_kernels.py on small listings: what is a loop, how often an instruction counts, and which pipe it holds."""

import pytest

from bench import gpu_kernels as counting

# As cuobjdump -sass writes it: a loop in a loop, and at the end a wait that branches back and the trap behind the exit.
LISTING = """
		Function : scan
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
                                                                    /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.64 R2, desc[UR4][R4.64] ;  /* 0x0 */
        /*0020*/                   MUFU.EX2 R6, R2 ;                /* 0x0 */
        /*0030*/                   FFMA R7, R6, R7, R3 ;            /* 0x0 */
        /*0040*/                   BRA 0xb0 ;                       /* 0x0 */
        /*0050*/                   LOP3.LUT R8, R8, 0x1, RZ, 0xc0, !PT ;
        /*0060*/               @P0 BRA 0x20 ;                       /* 0x0 */
        /*0070*/                   STS.128 [R9], R4 ;               /* 0x0 */
        /*0080*/              @!P1 BRA 0x10 ;                       /* 0x0 */
        /*0090*/                   EXIT ;                           /* 0x0 */
        /*00a0*/                   BRA 0xa0;                        /* 0x0 */
        /*00b0*/                   SYNCS.PHASECHK.TRANS64 P2, [UR4], R5 ;
        /*00c0*/              @!P2 BRA 0xb0 ;                       /* 0x0 */
        /*00d0*/                   BRA 0x50 ;                       /* 0x0 */
		Function : other
        /*0000*/                   EXIT ;                           /* 0x0 */
"""


def test_functions_and_their_instructions():
    found = counting.functions(LISTING)
    assert {name: len(code) for name, code in found.items()} == {"scan": 14, "other": 1}
    assert found["scan"][1] == (0x10, "LDG.E.64", "R2, desc[UR4][R4.64]", False)
    assert found["scan"][6] == (0x60, "BRA", "0x20", True)


def test_loops_are_found_from_outside_in_and_waits_are_none():
    outer, inner = counting.loops(counting.functions(LISTING)["scan"])
    assert inner == {2, 3, 4, 5, 6, 11, 12, 13} and outer == inner | {1, 7, 8}


def test_an_instruction_counts_for_each_pass_of_its_loops():
    counts = counting.count(counting.functions(LISTING)["scan"], [3, 4])
    assert counts["instructions"] == {"LDC": 1, "LDG": 3, "MUFU": 12, "FFMA": 12, "BRA": 12 * 4 + 3 + 1, "LOP3": 12, "STS": 3, "EXIT": 1, "SYNCS": 12}
    assert counts["cycles"] == {"issue": 108, "mufu": 96, "fma": 12, "alu": 24, "memory": 3 * 8 + 3 * 16}
    assert counts["bytes"] == {"global": 3 * 32 * 8, "shared": 3 * 32 * 16}


def test_passes_that_do_not_fit_the_loops_raise():
    with pytest.raises(ValueError, match=r"passes: expected one for each of the loops at \[1, 2\], got \[3\]"):
        counting.count(counting.functions(LISTING)["scan"], [3])


def test_a_loop_that_passes_once_may_be_none():
    assert counting.count(counting.functions(LISTING)["other"], [1, 1])["instructions"] == {"EXIT": 1}


@pytest.mark.parametrize(
    "op, pipe, cycles",
    [
        ("FFMA", "fma", 1),
        ("FFMA2", "fma", 2),
        ("IMAD.WIDE", "fma", 2),
        ("LOP3.LUT", "alu", 2),
        ("MUFU.RCP", "mufu", 8),
        ("SHFL.BFLY", "memory", 4),
        ("LDG.E.U16", "memory", 4),
        ("LDS.128", "memory", 16),
        ("UIADD3", "issue", 0),
        ("HMMA.16816.F32.BF16", "tensor", 4),
        ("HMMA.1688.F32.TF32", "tensor", 4),
        ("HGMMA.64x32x8.F32.TF32", "tensor", 16),
    ],
)
def test_the_pipe_of_an_instruction(op, pipe, cycles):
    assert counting.held(op) == (pipe, cycles)


def test_registers_shared_memory_and_programs_limit_the_warps():
    assert counting.warps(32, 0, 1) == 32  # programs
    assert counting.warps(32, 0, 4) == 64  # warps
    assert counting.warps(255, 0, 1) == 8  # registers
    assert counting.warps(32, 100 * 1024, 4) == 8  # shared memory


def test_the_bound_of_special_functions():
    """18 exponentials take 144 cycles of a quarter: 4.9 ps on 132 multiprocessors at 1.755 GHz."""
    assert counting.CASES["selective_scan"].forward.picoseconds(counting.GPUS["90"]) == {"memory": 2.0, "mufu": 4.86, "fma": 3.04}


def test_a_branch_whose_condition_is_an_operand_does_not_end_the_code():
    code = counting.functions(
        "\tFunction : f\n /*0000*/ FADD R0, R0, R0 ;\n /*0010*/ BRA.U !UP0, 0x0 ;\n /*0020*/ FADD R1, R1, R1 ;\n /*0030*/ EXIT ;\n"
    )["f"]
    assert code[1].conditional and counting.loops(code) == [{0, 1}]
