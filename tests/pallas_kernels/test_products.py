"""Products of the Hopper kernels: issued in one place, and their registers left alone in the
machine code."""

import ast
from pathlib import Path

import pallas_kernels
from pallas_kernels.testing.sass import instructions, left_factor, overwritten, written

ROOT = Path(pallas_kernels.__file__).parent
ISSUERS = {"wgmma", "wgmma_accumulator_load", "wgmma_wait"}

# What ptxas 13.0 made of a triangle of ones as the left factor of two products (R226: the element
# that is 1 for all threads).
MISCOMPILED = """
        /*107b0*/                   HGMMA.64x64x16.F32.BF16 R88, R216, gdesc[UR8].tnspB, R88 ;
        /*107c0*/                   UMOV UR10, UR56 ;
        /*107e0*/                   HGMMA.64x64x16.F32.BF16 R88, R224, gdesc[UR8].tnspB, R88, gsb0 ;
        /*10810*/                   IMAD.MOV.U32 R226, RZ, RZ, 0x3f803f80 ;
        /*10820*/                   WARPGROUP.ARRIVE ;
        /*10830*/                   HGMMA.64x64x16.F32.BF16 R88, R228, gdesc[UR8].tnspB, R88, gsb0 ;
        /*10850*/              @!P0 LOP3.LUT R234, R235, 0x3, RZ, 0xc0, !PT ;
        /*109f0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*10a00*/                   FSEL R224, R89, RZ, !P3 ;
"""


def test_products_are_issued_in_one_place():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ISSUERS
        and getattr(node.value, "id", "") == "plgpu"
        or isinstance(node, ast.ImportFrom)
        and {alias.name for alias in node.names} & ISSUERS
    }
    assert users == {"mosaic_gpu.py"}


def test_a_register_written_before_the_wait_is_found():
    (found,) = overwritten(instructions(MISCOMPILED))
    assert (found.register, found.product.address, found.writer.address) == (
        "R226",
        "107e0",
        "10810",
    )


def test_writes_after_the_wait_are_allowed():
    mended = MISCOMPILED.replace(
        "/*10810*/                   IMAD.MOV.U32 R226",
        "/*10810*/                   IMAD.MOV.U32 R236",
    )
    assert overwritten(instructions(mended)) == []


def test_a_wait_covers_all_but_the_last_groups():
    one_runs_on = MISCOMPILED.replace("gsb0, 0x0", "gsb0, 0x1").replace("R226, RZ", "R236, RZ")
    assert overwritten(instructions(one_runs_on)) == []
    second = one_runs_on.replace("FSEL R224", "FSEL R229")
    (found,) = overwritten(instructions(second))
    assert (found.register, found.product.address) == ("R229", "10830")


def test_registers_of_instructions():
    def one(text):
        (instruction,) = instructions(f"        /*0010*/                   {text} ;")
        return instruction

    assert written(one("LDS.128 R4, [R2+0x10]")) == {4, 5, 6, 7}
    assert written(one("IMAD.WIDE.U32 R10, R2, 0x4, R8")) == {10, 11}
    assert written(one("LDSM.16.M88.4 R20, [R3]")) == {20, 21, 22, 23}
    assert written(one("ISETP.GE.AND P0, PT, R4, R5, PT")) == set()
    assert written(one("STS.128 [R2], R4")) == set()
    assert written(one("BAR.SYNC.DEFER_BLOCKING R237, 0x80")) == set()
    assert left_factor(one("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88")) == set()
    assert left_factor(one("HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8], R88")) == {24, 25, 26, 27}
