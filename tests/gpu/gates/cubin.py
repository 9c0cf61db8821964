"""What ptxas made of a kernel: registers, shared memory, spills, tensor-core instructions and access widths, read off
the machine code with NVIDIA's cuobjdump. Needs neither a GPU nor a driver."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

REMEDY = "needs cuobjdump, which Triton and the CUDA toolkit bring: pip install triton, or nvidia-cuda-cuobjdump"
INSTRUCTION = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
"""A line of disassembly; the group is the opcode."""
INSTRUCTION_BYTES = 16
SYSTEM_SHARED = 1024
"""Bytes that cuobjdump adds on sm_90 and later to a kernel that uses shared memory: the driver's own share."""


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture."""

    name: str  # as in the file, mangled
    arch: int
    registers: int  # per thread
    shared: int  # static shared memory in bytes, without the driver's share
    stack: int  # bytes of stack and of local memory per thread
    spills: int  # instructions that read or write local memory
    tensor_cores: int  # instructions that run on tensor cores
    atomics: int  # atomic instructions on global or shared memory
    widest_load: int  # bytes of the widest access to global memory by one thread, 0 if there is none
    widest_store: int
    instructions: int  # without what fills the end of the code


def cuobjdump() -> str | None:
    """Where the tool is: in Triton, on the PATH, in a CUDA toolkit or in its own package."""
    return _tool("cuobjdump")


@functools.cache
def _tool(name: str) -> str | None:
    inside = (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin"), ("nvidia", "cuda_cuobjdump/bin"))
    folders = []
    for package, folder in inside:
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec else None
        folders += [f"{place}/{folder}" for place in places or ()]
    folders += [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


@functools.cache
def read(binary: bytes) -> dict[tuple[int, str], MachineCode]:
    """Every kernel in a cubin, or in a library that has cubins inside: (architecture, name) -> its code.

    What was found is kept in the user's cache folder.
    """
    codes = _cached(binary)
    if codes is None:
        codes = _keep(binary, _parse(_run(binary, "-res-usage"), _run(binary, "-sass").splitlines()))
    return {(code.arch, code.name): code for code in codes}


def read_kernels(cubins: Iterable[bytes], arch: int) -> None:
    """Read those of the cubins for ``arch`` that hold nothing but a kernel all in one go, so that `read` finds them in
    the cache.

    The disassembler takes 0.4 s to start and a few milliseconds for a kernel, so it gets them as one piece of code.
    """
    tool, name = _tool("nvdisasm"), f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    new = [(cubin, _instructions(cubin)) for cubin in dict.fromkeys(cubins) if _cached(cubin) is None]
    new = [(cubin, instructions) for cubin, instructions in new if instructions]
    if tool is None or not new:
        return
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(instructions for _, instructions in new))
        file.flush()
        command = [tool, "--binary", name, file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    opcodes = [found.group(1) for line in lines if (found := re.match(INSTRUCTION, line))]
    if len(opcodes) != sum(len(instructions) for _, instructions in new) // INSTRUCTION_BYTES:
        raise RuntimeError(f"{' '.join(command)} read {len(opcodes)} instructions, not as many as there are")
    end = 0
    for cubin, instructions in new:
        start, end = end, end + len(instructions) // INSTRUCTION_BYTES
        ((name, usage),) = re.findall(r"Function (\S+):\s*(REG:.*)", _run(cubin, "-res-usage"))
        _keep(cubin, [_machine_code(arch, name, _numbers(usage), opcodes[start:end])])


def _instructions(cubin: bytes) -> bytes:
    """The code in an ELF file of 64 bits; empty if there is more than one section of it."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + 64 * number) for number in range(count)]
    texts = [
        cubin[place : place + size]
        for name, _, _, _, place, size in headers
        if cubin[headers[names][4] + name :].startswith(b".text.")
    ]
    return texts[0] if len(texts) == 1 else b""


def _cached(binary: bytes) -> list[MachineCode] | None:
    file = _cache() / f"{hashlib.sha256(binary).hexdigest()}.json"
    if not file.exists():
        return None
    return [MachineCode(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))]


def _keep(binary: bytes, codes: list[MachineCode]) -> list[MachineCode]:
    file = _cache() / f"{hashlib.sha256(binary).hexdigest()}.json"
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps([asdict(code) for code in codes]), encoding="utf-8")
    unfinished.replace(file)
    return codes


def compiler_of(binary: bytes) -> str:
    """The release of ptxas that wrote a cubin, or the cubins inside a library."""
    match = re.search(r"Tool Version:.*V([\d.]+)", _run(binary, "-elf"))
    return match.group(1) if match else "unknown"


def _run(binary: bytes, *arguments: str) -> str:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError(REMEDY)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _cache() -> Path:
    """Findings of this tool, read by this file as it is now."""
    tool = Path(cuobjdump() or "").stat()
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{tool.st_size} {tool.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlip_kernels" / f"machine_code-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _parse(resources: str, disassembly: Iterable[str]) -> list[MachineCode]:
    opcodes: dict[tuple[int, str], list[str]] = {}
    of_kernel: list[str] = []
    arch = 0
    for line in disassembly:
        if found := re.match(INSTRUCTION, line):
            of_kernel.append(found.group(1))
        elif found := re.match(r"\s*code for sm_(\d+)", line):
            arch = int(found.group(1))
        elif found := re.match(r"\s*Function : (\S+)", line):
            of_kernel = opcodes.setdefault((arch, found.group(1)), [])

    codes = []
    only = arch  # of a lone cubin the resources do not name the architecture
    for line in resources.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            only = int(found.group(1))
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found.group(1)
        elif "REG:" in line:
            codes.append(_machine_code(only, name, _numbers(line), opcodes[only, name]))
    return codes


def _numbers(usage: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}


def _machine_code(arch: int, name: str, usage: dict[str, int], opcodes: list[str]) -> MachineCode:
    shared = usage["SHARED"]
    if arch >= 90 and shared >= SYSTEM_SHARED:
        shared -= SYSTEM_SHARED
    return MachineCode(
        name=name,
        arch=arch,
        registers=usage["REG"],
        shared=shared,
        stack=usage["STACK"] + usage["LOCAL"],
        spills=sum(_base(opcode) in ("LDL", "STL") for opcode in opcodes),
        tensor_cores=sum(is_tensor_core(opcode) for opcode in opcodes),
        atomics=sum(_base(opcode) in ATOMICS for opcode in opcodes),
        widest_load=max((_width(opcode) for opcode in opcodes if _base(opcode) in LOADS), default=0),
        widest_store=max((_width(opcode) for opcode in opcodes if _base(opcode) in STORES), default=0),
        instructions=sum(_base(opcode) != "NOP" for opcode in opcodes),
    )


# Generic LD and ST count too: the compiler uses them where it cannot tell that an address is global. Bulk copies
# (UBLKCP, UTMALDG, UTMASTG) move whole rows.
LOADS = ("LDG", "LDGSTS", "LD", "UBLKCP", "UTMALDG")
STORES = ("STG", "ST", "UBLKCP", "UTMASTG")
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "UTMAREDG")


def _base(opcode: str) -> str:
    return opcode.partition(".")[0]


def is_tensor_core(opcode: str) -> bool:
    """HMMA, IMMA, DMMA, HGMMA, QGMMA, UTCHMMA, ...; HFMA2.MMA is an ordinary instruction."""
    return _base(opcode).endswith("MMA")


def _width(opcode: str) -> int:
    if _base(opcode).startswith("U"):
        return 16
    for part in opcode.split("."):
        if part in ("256", "128", "64"):
            return int(part) // 8
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:]) // 8
    return 4
