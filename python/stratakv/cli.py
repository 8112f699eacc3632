"""The `stratakv` command: one subcommand per job, each with its own options and exit status.

What a subcommand needs beyond the standard library and the package is imported when it runs.
Exit status: 0 done, 1 the job found what it must not find, 2 wrong usage or something needed is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import stratakv
from stratakv import archive, demo, gpu, routing, status, watch

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

    models = commands.add_parser(
        "models",
        help="list the models of a folder, and which cannot be cached",
        description="Looks through a folder of models, a Hugging Face cache or one model. Reads no weights.",
        epilog="Exit status: 0 if all can be cached, 1 if one cannot, 2 if there is no such folder.",
    )
    models.add_argument("folder", help="where to look")
    models.add_argument("--json", action="store_true", help="for programs")
    models.set_defaults(run=_list_models)

    device = commands.add_parser(
        "gpu",
        help="say which GPU there is, and check it",
        description="Looks at a device of the driver, or checks that it does what it should, and how fast.",
        epilog="Exit status: 0 if all is right, 1 if something is wrong, 2 if there is none.",
    )
    gpu.add_arguments(device)

    route = commands.add_parser(
        "route",
        help="say which replica should serve a prompt, and why",
        description="Listens to the KV events of the replicas of a file for a while, then routes one prompt.",
        epilog="Exit status: 0 if there is a replica, 1 if there is none, 2 if it could not run.",
    )
    routing.add_arguments(route)

    health = commands.add_parser(
        "status",
        help="ask each tier of a configuration whether it answers",
        description="Asks each tier that is configured, and says what a store would run without.",
        epilog="Exit status: 0 if all answer, 1 if one does not, 2 if the configuration makes no sense.",
    )
    status.add_arguments(health)

    for name, says, add, does in (
        ("top", "watch a store that runs", watch.add_top, "Shows tiers, models, hits and misses, again and again."),
        ("stats", "say once what `top` shows", watch.add_stats, "All numbers of a store that runs."),
        ("events", "say which blocks come and go", watch.add_events, "What the tiers of a running store got and lost."),
        ("explain", "say why a prompt hits or misses", watch.add_explain, "Block by block, without counting as a use."),
    ):
        ends = {
            "stats": "0 if all is well, 1 if the store is degraded, 2 if nobody answers.",
            "explain": "0 if something would be loaded, 1 if not, 2 if nobody answers.",
        }
        epilog = f"Exit status: {ends.get(name, '0, or 2 if nobody answers.')}"
        add(commands.add_parser(name, help=says, description=does, epilog=epilog))

    complete = commands.add_parser(
        "completion",
        help="print what completes these commands in a shell",
        description="As: stratakv completion bash > ~/.local/share/bash-completion/completions/stratakv",
        epilog="Exit status: 0, or 2 if shtab is not installed.",
    )
    complete.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    complete.set_defaults(run=lambda args: _complete(parser, args.shell))

    args = parser.parse_args(argv)
    done: int = args.run(args)
    return done


def _complete(parser: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab
    except ImportError:
        print("stratakv completion: shtab is not installed: pip install 'stratakv[observe]'", file=sys.stderr)
        return 2
    print(shtab.complete(parser, shell=shell))
    return 0


def _list_models(args: argparse.Namespace) -> int:
    try:
        found = stratakv.discover(args.folder)
    except stratakv.InputError as error:
        print(f"stratakv models: {error}", file=sys.stderr)
        return 2
    if args.json:
        rows = [
            {"name": m.name, "path": str(m.path), "geometry": asdict(m.geometry), "weights_bytes": m.weights_bytes}
            for m in found.models
        ]
        refused = [{"name": m.name, "path": str(m.path), "reason": m.reason} for m in found.refused]
        print(json.dumps({"models": rows, "refused": refused}))
        return 1 if refused else 0
    for model in found.models:
        g = model.geometry
        planes = "latent" if g.planes == 1 else f"{g.kv_heads} kv heads x {g.head_dim}"
        size = f"{g.token_bytes / 1024:g} KiB a token, weights {model.weights_bytes / 2**30:.1f} GiB"
        print(f"{model.name}: {g.layers} layers, {planes}, {g.dtype}, {size}")
    for each in found.refused:
        print(f"{each.name}: cannot be cached: {each.reason}")
    if not found.models and not found.refused:
        print("no models found")
    return 1 if found.refused else 0


if __name__ == "__main__":
    sys.exit(main())
