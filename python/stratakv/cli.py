"""The `stratakv` command: one subcommand per job, each with its own options and exit status.

What a subcommand needs beyond the standard library and the package is imported when it runs.
Exit status: 0 done, 1 the job found what it must not find, 2 wrong usage or something needed is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import stratakv
from stratakv import archive, demo

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(prog="stratakv", description="A KV cache for LLM serving.")
    parser.add_argument("--version", action="version", version=f"stratakv {stratakv.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    show = commands.add_parser(
        "demo",
        help="let a real model answer with a fraction of the prefill, also after SIGKILL",
        description="Several users talk to one model over a long shared system prompt, with too little RAM for all. "
        "In mid-run the process is killed with SIGKILL and a new one goes on. Every answer is compared with the "
        "uncached one.",
        epilog="Exit status: 0 if every answer equals the uncached one, 1 if not, 2 if it could not run.",
    )
    demo.add_arguments(show)
    show.set_defaults(run=demo.run)

    ssd = commands.add_parser(
        "ssd",
        help="show, check, export or import a store's directory",
        description="Looks at the directory of a store (ssd.path) without opening the store.",
        epilog="Exit status: 0 if all is right, 1 if a record is wrong, 2 if it could not run.",
    )
    archive.add_arguments(ssd)

    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
