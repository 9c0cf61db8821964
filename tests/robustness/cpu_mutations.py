"""Mutation testing of the CPU kernels: break them in one place at a time, and see whether a test fails.

    make mutations ARGS="--count 60 --seed 0"

A mutation leaves out a tail, a clamp, a condition or a fill with zeros, stops a loop one step early, or turns a sign,
in one line of csrc/cpu. The sources that include that line are compiled again, linked with the rest into a copy of the
package, and the tests of the family run against the copy. What no test notices is printed: it is a missing test, or a
line that makes no difference to results. Only the instruction set of this processor is exercised.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_build"))
import compilers  # noqa: E402

RULES = (
    ("tail left out", r"if \((const int64_t rest = )([^;{]+)\) \{", r"if (\g<1>0 * (\g<2>)) {"),
    ("tail left out", r"if \((?:whole|d|done|k) < (?:width|channels)\)", "if (false)"),
    ("clamp dropped", r"\b(\w[\w. +*]*) < ([\w. ()+*]+) \? \1 : \2", r"\2"),
    ("condition never true", r"^(\s*)if \((?!constexpr)([^;{]+)\) (continue|return|break)", r"\1if (false) \3"),
    ("condition never true", r"^(\s*)if \((?!constexpr|const|false)([^;]+)\) \{$", r"\1if (false) {"),
    ("no zeros filled in", r"^(\s*)(?:if \([^;]+\) )?std::memset\(.*\);", r"\1;"),
    ("loop one step short", r"(for \([^;]*; \w+ < )([^;]+)(; \+\+)", r"\1\2 - 1\3"),
    ("loop begins late", r"(for \(int64_t \w+ = )0;", r"\g<1>1;"),
    ("sign turned", r"(load\([^;]*\)) \+ (?=[^;]*load\()", r"\1 - "),
    ("sign turned", r"(\w+) \+= (?!LANES)(?=[^;]*load\()", r"\1 -= "),
)
"""What a mutation is called, what it replaces in a line, and by what."""

NO_DIFFERENCE = re.compile(
    r"prefetch|ahead|stream|//|MLIP_UNROLL|#"
    r"|next\.rows"  # of a prefetch
    r"|if \(pack\("  # unrolled code for one length: the factors take its place
    r"|(from|first) \+ block < p\.tokens"  # a block goes on with the rows of the next
    r"|source_count == 0"  # an empty loop follows
    r"|column < groups\[g\]\.length"  # columns that no result is read from
)
"""Comments, directives, and lines without which results stay right: they decide on speed alone."""

PROMISES = [f"tests/promises/test_{name}.py" for name in ("accuracy", "layouts", "masks", "determinism")]
TESTS = {
    "merging": ["tests/merging", *PROMISES],
    "spectral": ["tests/spectral", *PROMISES],
    "contrastive": ["tests/contrastive", *PROMISES],
}

THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # several campaigns may run beside each other


@dataclass(frozen=True)
class Mutation:
    """One line of one source, and what becomes of it."""

    kind: str
    source: Path
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.kind}: {self.before.strip()}  ->  {self.after.strip()}"


def mutations() -> Iterator[Mutation]:
    """All mutations of csrc/cpu, in the order of files and lines."""
    for folder in TESTS:
        for path in sorted((ROOT / "csrc/cpu" / folder).iterdir()):
            source = path.relative_to(ROOT)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                if NO_DIFFERENCE.search(line):
                    continue
                for kind, pattern, replacement in RULES:
                    changed = re.sub(pattern, replacement, line, count=1)
                    if changed != line:
                        yield Mutation(kind, source, number + 1, line, changed)


class Build:
    """The CPU part in a folder of its own, compiled again in part for each mutation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        ignored = shutil.ignore_patterns("_*.so", "__pycache__", "_build.json")
        shutil.copytree(ROOT / "mlip_kernels", folder / "mlip_kernels", ignore=ignored)
        for name in ("tests", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        patterns = ("csrc/bindings/cpu/*.cpp", "csrc/cpu/**/*.cpp")
        self.sources = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        self.compile(self.sources)
        loaded = "from mlip_kernels._loading import LOADED; raise SystemExit(LOADED['cpu'] != 'ok' and LOADED['cpu'])"
        subprocess.run([sys.executable, "-c", loaded], cwd=folder, env=self.environment(), check=True)

    def environment(self) -> dict[str, str]:
        """Of processes that run the copy."""
        return {**os.environ, **THREADS, "PYTHONPATH": str(self.folder)}

    def compile(self, sources: list[Path]) -> None:
        """Compile ``sources`` at -O1 and link all objects to the library of the copy."""
        flags = [flag for flag in compilers.cxx_flags() if flag not in ("-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}")]
        command = [*compilers.cxx(), *flags, "-O1", "-w", f"-I{self.folder / 'csrc'}"]
        for source in sources:
            compilers.run([*command, "-MD", "-MF", f"{source}.d", "-c", str(source), "-o", f"{source}.o"])
        objects = [f"{source}.o" for source in self.sources]
        library = self.folder / "mlip_kernels/_cpu.so"
        library.unlink(missing_ok=True)
        compilers.run([*compilers.cxx(), "-shared", *objects, *compilers.torch_libraries(), "-o", str(library)])
        # Without a record of it, the package would not load the library, and tests would see the reference alone.
        record = {"cpu": "ok", "cuda": "not built", "torch": metadata.version("torch")}
        compilers.package_module("_build_record").write(self.folder / "mlip_kernels", record)

    def including(self, source: Path) -> list[Path]:
        """The sources that read ``source``, by what the compiler wrote down."""
        name = str(self.folder / source)
        return [path for path in self.sources if name in Path(f"{path}.d").read_text().replace("\\\n", " ").split()]

    def survives(self, mutation: Mutation) -> bool:
        """Whether the tests of the family pass with this mutation; what does not compile or run counts as noticed."""
        path = self.folder / mutation.source
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[mutation.line - 1] = mutation.after
        affected = self.including(mutation.source)
        objects = {compiled: compiled.read_bytes() for compiled in (Path(f"{name}.o") for name in affected)}
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            self.compile(affected)
            return self.tests_pass(mutation.source.parts[2])
        except compilers.FailedError:
            return False
        finally:
            path.write_text((ROOT / mutation.source).read_text(encoding="utf-8"), encoding="utf-8")
            for compiled, before in objects.items():
                compiled.write_bytes(before)

    def tests_pass(self, family: str) -> bool:
        """Run the tests of ``family`` until one fails."""
        options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header"]
        command = [sys.executable, "-m", "pytest", *options, *TESTS[family]]
        try:
            done = subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, timeout=900)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def main() -> int:
    """Draw mutations, try them, and print those that survive; 1 if more than a twentieth do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="how many mutations to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print them without trying them")
    options = parser.parse_args()
    every = list(mutations())
    drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
    if options.list:
        print(*drawn, f"{len(every)} in all", sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder) / "mutated")
        for family in sorted({mutation.source.parts[2] for mutation in drawn}):
            if not build.tests_pass(family):
                print(f"the tests of {family} fail without a mutation: {shlex.join(TESTS[family])}")
                return 2
        survivors = []
        for number, mutation in enumerate(drawn, 1):
            survives = build.survives(mutation)
            survivors += [mutation] if survives else []
            print(f"{number}/{len(drawn)} {'SURVIVES' if survives else 'noticed'} {mutation}", flush=True)
    print(f"{len(drawn) - len(survivors)} of {len(drawn)} noticed", *survivors, sep="\n")
    return int(len(survivors) * 20 > len(drawn))


if __name__ == "__main__":
    sys.exit(main())
