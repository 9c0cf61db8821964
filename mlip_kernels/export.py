"""Command line of the export: ``mlip-export`` or ``python -m mlip_kernels.export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlip_kernels._extras import needing


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(
        prog="mlip-export",
        description="Write a trained model as a folder that another library loads, and print how to load it.",
    )
    result.add_argument("source", help="folder of MLIP.save_pretrained, output folder or checkpoint of mlip-train")
    result.add_argument("output", help="folder to write; new or empty")
    result.add_argument(
        "--to",
        required=True,
        choices=("open_clip", "timm", "safetensors"),
        help="both towers for open_clip, the image tower for timm, or all of it for MLIP.from_pretrained",
    )
    result.add_argument(
        "--guide",
        choices=("none", "spatial", "key_norm", "frequency", "both"),
        help="which tokens merge last there, where the model asks its Frequency Stage, which only an MLIP has",
    )
    result.add_argument("--no-merging", action="store_true", help="let the model merge no tokens there")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; bad input ends with one line on standard error and exit code 2."""
    options = parser().parse_args(arguments)
    try:
        with needing("train", "mlip-export"):
            from mlip_kernels.models.export import export, read

            model = read(Path(options.source))
            done = export(model, options.to, options.output, guide=options.guide, merging=not options.no_merging)
    except (ValueError, TypeError, OSError, ImportError) as failure:
        print(f"mlip-export: error: {' '.join(str(failure).split())}", file=sys.stderr)
        return 2
    print(f"wrote {done.folder}; load it with\n  {done.load}")
    if done.merge is not None:
        print(f"and let it merge tokens as the model does with\n  {done.merge}")
    if options.to != "safetensors" and options.guide is not None:
        print(f"guide {options.guide!r} in place of the model's own: other tokens merge than in the model")
    if done.left:
        what = "what serves training alone" + (", and the text tower" if options.to == "timm" else "")
        print(f"not in it ({what}): {', '.join(done.left)}")
    return 0


def command() -> int:
    """`main` for a command of its own."""
    return main()


if __name__ == "__main__":
    sys.exit(command())
