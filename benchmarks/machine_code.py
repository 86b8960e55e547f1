"""What compiled kernels say of themselves: widths of accesses, registers, stack, barriers in loops, instructions.

Reads SASS, the code that a GPU runs, by the disassembler that comes with Triton; no GPU is needed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of an SM of sm_80 and sm_90
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of an SM
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([\w.]+)(.*?);", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Code:
    """A compiled kernel.

    Args:
        registers: of a thread.
        stack: bytes of a thread, spills included.
        shared: bytes of a block.
        instructions: of a thread in its longest loop over global memory, in all of the kernel where it has none.
        loads, stores: accesses of global memory among them: bytes that a thread moves at once -> number.
        exchanges: barriers and accesses of shared memory among them, by the instruction's name.
        loop: whether there is such a loop.
    """

    registers: int
    stack: int
    shared: int
    instructions: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    exchanges: Counter[str] = field(default_factory=Counter)
    loop: bool = False

    def occupancy(self, threads: int, capability: int) -> float:
        """The share of an SM's threads that can be resident, for blocks of some threads."""
        warps = threads // 32
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // of_warp // warps
        by_shared = SHARED[capability] // (self.shared + 1024)  # the system takes 1 KB a block
        return min(by_registers, by_shared, BLOCKS, THREADS // threads) * threads / THREADS


def read(binary: bytes, listing: bool = True) -> dict[str, Code]:
    """Function -> what it says, of a cubin or of an object file of nvcc; without a listing its resources alone."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = [
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", *(["-sass"] if listing else []))
        ]
    if not listing:
        return {name: Code(*map(int, numbers)) for name, *numbers in _USAGE.findall(said[0])}
    usage = {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(said[0])}
    found = {}
    for text in said[1].split("Function : ")[1:]:
        name = text.split()[0]
        registers, stack, shared = usage[name]
        found[name] = read_function(text, Code(registers, stack, shared))
    return found


def read_function(text: str, code: Code) -> Code:
    """`code` with what the listing of its instructions says."""
    lines = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(text) if name != "NOP"]
    chosen = lines
    for address, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        inside = [line for line in lines if int(target[1], 16) <= line[0] <= address]
        if any(n.startswith(("LDG", "STG")) for _, n, _ in inside) and (not code.loop or len(inside) > len(chosen)):
            chosen, code.loop = inside, True
    code.instructions = len(chosen)
    for _, name, _ in chosen:
        kind, *more = name.split(".")
        if kind in ("LDG", "STG", "LD", "ST"):
            width = next((_WIDTH[part] for part in more if part in _WIDTH), 4)
            (code.loads if kind.startswith("L") else code.stores)[width] += 1
        elif kind in ("BAR", "LDS", "STS", "LDSM", "STSM"):
            code.exchanges[kind] += 1
    return code
