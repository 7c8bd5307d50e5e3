"""Counting instructions in machine code."""

from __future__ import annotations

from vnm_compile.inspection.assembly import count_instructions

SASS = """
.L_x_1:
        /*0000*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64], P1 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0030*/               @P2 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.64 R1, desc[UR4][R2.64] ;
.L_x_2:
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0060*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0070*/                   LDS.128 R1, [R2] ;
        /*0080*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0090*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00a0*/               @P2 BRA `(.L_x_2) ;
"""

AMD = """
.LBB0_1:
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_ushort v1, v2, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	s_cbranch_scc1 .LBB0_1
	global_load_b128 v[0:3], v[4:5], off
	s_endpgm
"""


def test_sass():
    whole, loop = count_instructions(SASS), count_instructions(SASS, loop_only=True)
    assert whole.loads == {2: 1, 4: 1, 8: 1, 16: 1}
    assert whole.tensor_core == 1
    assert whole.total == 11
    # The loop that multiplies is the hot one, although another is longer.
    assert loop.loads == {2: 1, 16: 1}
    assert loop.names["BRA"] == 1


def test_amdgcn():
    whole, loop = count_instructions(AMD), count_instructions(AMD, loop_only=True)
    assert whole.loads == {2: 1, 16: 2}
    assert loop.loads == {2: 1, 16: 1}
    assert loop.tensor_core == 1


def test_no_loop():
    assert count_instructions("        /*0000*/                   EXIT ;", loop_only=True).total == 0
