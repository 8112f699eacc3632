"""`stratakv route`: which replica should serve a prompt, by the events that the replicas publish.

The file of replicas, in TOML:

    policy = "cache_aware"                  # or least_loaded
    [weights]                               # of variants, if there are some
    a = 0.9
    b = 0.1
    [[replica]]
    name = "one"
    events = "tcp://10.0.0.1:5557"          # --kv-events-config of vLLM and SGLang
    replay = "tcp://10.0.0.1:5558"          # where missed events are asked for
    model = "llama"
    block_tokens = 16
    variant = "a"
    load_tokens = 1200
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stratakv.errors import StrataKVError
from stratakv.events import Subscriber
from stratakv.router import Router


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv route`."""
    parser.add_argument("replicas", help="a TOML file of replicas: [[replica]] with name, events, replay, block_tokens")
    parser.add_argument("--tokens", required=True, metavar="FILE", help="token ids of the prompt: a JSON list, or - ")
    parser.add_argument("--model", default="", help="what has to serve it (default: the one without a name)")
    parser.add_argument("--adapter", default="", help="name of the LoRA adapter")
    parser.add_argument("--tenant", default="", help="salt of the tenant")
    parser.add_argument("--session", help="what stays with one variant")
    parser.add_argument(
        "--listen", type=float, default=2.0, metavar="SECONDS", help="for so long (default: %(default)s)"
    )
    says = parser.add_mutually_exclusive_group()
    says.add_argument("--explain", action="store_true", help="a line for each replica, and not the name alone")
    says.add_argument("--json", action="store_true", help="the same for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Routes one prompt."""
    try:
        config = tomllib.loads(Path(args.replicas).read_text(encoding="utf-8"))
        text = sys.stdin.read() if args.tokens == "-" else Path(args.tokens).read_text(encoding="utf-8")
        tokens = json.loads(text)
        decision = _listen(config, args.listen).route(
            tokens, model=args.model, adapter=args.adapter, tenant=args.tenant, session=args.session
        )
    except (OSError, ValueError, TypeError, StrataKVError) as error:
        print(f"stratakv route: {error}", file=sys.stderr)
        return 2
    if args.json:
        candidates = [asdict(each) for each in decision.candidates]
        names = ("replica", "reason", "tokens")
        print(json.dumps({name: getattr(decision, name) for name in names} | {"candidates": candidates}))
    else:
        print(decision if args.explain else decision.replica or decision.reason)
    return 0 if decision.replica else 1


def _listen(config: dict[str, Any], seconds: float) -> Router:
    router = Router(config.get("policy", "cache_aware"))
    with ExitStack() as stack:
        subscribers = {}
        for row in config.get("replica", []):
            options = {
                key: row[key] for key in ("model", "block_tokens", "variant", "prefill_tokens_per_s") if key in row
            }
            router.add_replica(row["name"], **options)
            router.report(row["name"], load_tokens=row.get("load_tokens"), unhealthy=row.get("unhealthy"))
            if "events" in row:
                subscribers[row["name"]] = stack.enter_context(Subscriber(row["events"], row.get("replay")))
        router.set_weights(config.get("weights", {}))
        end = time.monotonic() + seconds
        while subscribers and time.monotonic() < end:
            for name, subscriber in subscribers.items():
                router.apply(name, subscriber.poll(0.02))
    return router
