"""StrataConnector under vLLM's own schedulers, where the engine cannot run here: steps in flight, ranks, stages.

The model is a function: what a layer of a rank keeps of a token is a digest of all tokens up to it, and so is the token
that follows. So a forward pass can look at every block that it reads, and says so if one holds anything else.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.v1.outputs")  # All of it: parts of it warn when they are imported.
torch = pytest.importorskip("torch")

from vllm import SamplingParams  # noqa: E402 (after the skips)
from vllm.config import KVTransferConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

from engines.test_vllm import connector, llama  # noqa: E402
from engines.vllm_engine import damage  # noqa: E402
from stratakv.integrations.vllm import StrataConnector  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

BLOCK, BLOCKS, HEADS, HEAD = 16, 48, 2, 64
SPEC = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD, dtype=torch.float32)


def digests(tokens: list[int]) -> list[int]:
    """For each token what the model makes of it and all before it, 20 bits."""
    out, before = [], b""
    for token in tokens:
        before = blake2b(before + token.to_bytes(4, "little"), digest_size=16).digest()
        out.append(int.from_bytes(before[:3], "little") >> 4)
    return out


def following(tokens: list[int]) -> int:
    return digests(tokens)[-1] % 1000


@dataclasses.dataclass
class Running:
    tokens: list[int]
    blocks: list[int]


class Rank:
    """A worker's side, and a forward pass over its layers that checks what it reads."""

    def __init__(self, config: Any, layers: list[str], number: int) -> None:
        groups = [KVCacheGroupSpec(layers, SPEC)]
        cache = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
        self.connector = StrataConnector(config, KVConnectorRole.WORKER, cache)
        self.caches = {name: torch.full((BLOCKS, HEADS, BLOCK, 2 * HEAD), -1.0) for name in layers}
        self.connector.register_kv_caches(self.caches)
        self.salts = {name: float(blake2b(f"{number}{name}".encode(), digest_size=2).digest()[0]) for name in layers}
        self.running: dict[str, Running] = {}
        # Done between what the scheduler was told and what is loaded.
        self.between: Callable[[], None] = lambda: None

    def execute(self, output: Any) -> ModelRunnerOutput:
        for name in output.finished_req_ids:
            self.running.pop(name, None)
        computed = {}
        for new in output.scheduled_new_reqs:
            self.running[new.req_id] = Running(list(new.prompt_token_ids), list(new.block_ids[0]))
            computed[new.req_id] = new.num_computed_tokens
        again = output.scheduled_cached_reqs
        for name, blocks, count in zip(again.req_ids, again.new_block_ids, again.num_computed_tokens, strict=True):
            if name in again.resumed_req_ids:
                self.running[name].blocks = []
            self.running[name].blocks += blocks[0] if blocks else []
            computed[name] = count
        self.connector.bind_connector_metadata(output.kv_connector_metadata)
        self.between()
        self.connector.start_load_kv(None)
        sampled = [self.forward(name, computed[name], count) for name, count in output.num_scheduled_tokens.items()]
        self.connector.wait_for_save()
        told = KVConnectorOutput()
        told.finished_sending, told.finished_recving = self.connector.get_finished(output.finished_req_ids)
        told.invalid_block_ids = self.connector.get_block_ids_with_load_errors()
        told.kv_connector_stats = self.connector.get_kv_connector_stats()
        told.kv_connector_worker_meta = self.connector.build_connector_worker_meta()
        self.connector.clear_connector_metadata()
        names = list(output.num_scheduled_tokens)
        index = {name: n for n, name in enumerate(names)}
        return ModelRunnerOutput(names, index, sampled_token_ids=sampled, kv_connector_output=told)

    def forward(self, name: str, start: int, count: int) -> list[int]:
        one = self.running[name]
        stop = start + count
        made = torch.tensor(digests(one.tokens[:stop]), dtype=torch.float32)
        for layer, cache in self.caches.items():
            for at in range(0, stop, BLOCK):
                page, end = cache[one.blocks[at // BLOCK]], min(at + BLOCK, stop)
                right = (made[at:end] + self.salts[layer])[None, :, None].expand(HEADS, -1, 2 * HEAD)
                old = max(min(start, end) - at, 0)
                assert torch.equal(page[:, :old], right[:, :old]), f"{name}: wrong bytes within {at}..{at + old}"
                page[:, old : end - at] = right[:, old:]
        if stop < len(one.tokens):
            return []
        one.tokens.append(following(one.tokens))
        return [one.tokens[-1]]


class Engine:
    """A scheduler of vLLM, as many steps ahead as asked for, and its ranks."""

    def __init__(
        self, folder: Path, model: Path, *, asynchronous: bool, ahead: int, stages: int, ranks: int, prefixes: bool
    ) -> None:
        """`ranks`: of each stage of `stages`; `prefixes`: whether the engine caches some itself."""
        options = connector(folder, ram="2MiB")
        transfer = KVTransferConfig(kv_role="kv_both", **options)
        self.config = EngineArgs(
            model=str(model), dtype="float32", block_size=BLOCK, max_model_len=512, skip_tokenizer_init=True,
            max_num_batched_tokens=512, max_num_seqs=8, enable_prefix_caching=prefixes, kv_transfer_config=transfer,
        ).create_engine_config()  # fmt: skip
        self.config.scheduler_config.async_scheduling = asynchronous
        self.config.cache_config.num_gpu_blocks = BLOCKS
        world = stages * ranks
        parallel = self.config.parallel_config
        parallel.pipeline_parallel_size, parallel.tensor_parallel_size, parallel.world_size = stages, ranks, world
        layers = [f"model.layers.{n}.self_attn.attn" for n in range(2 * stages)]
        self.ranks = []
        for number in range(world):
            stage = number // ranks
            mine = dataclasses.replace(self.config)
            mine.parallel_config = dataclasses.replace(parallel)
            mine.parallel_config.rank, mine.parallel_config.world_size = number, world
            with set_current_vllm_config(mine):
                self.ranks.append(Rank(mine, layers[2 * stage : 2 * stage + 2], number % ranks))
        groups = [KVCacheGroupSpec(layers[:2], SPEC)]
        kind = AsyncScheduler if asynchronous else Scheduler
        with set_current_vllm_config(self.config):
            self.scheduler = kind(
                vllm_config=self.config,
                kv_cache_config=KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups),
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=BLOCK,
                hash_block_size=BLOCK,
                log_stats=True,
            )
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, n): rank.connector.get_handshake_metadata() for n, rank in enumerate(self.ranks)}
        )
        self.together = KVOutputAggregator(world)
        self.ahead = ahead
        self.in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.said: dict[str, list[int]] = {}
        self.counted: dict[str, float] = {}

    def add(self, name: str, tokens: list[int], count: int) -> None:
        greedy = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request(name, tokens, greedy, None, block_hasher=hasher))
        self.said[name] = []

    def step(self) -> None:
        """One more step is on its way; the oldest comes in when as many are as may be."""
        output = self.scheduler.schedule()
        self.in_flight.append((output, self.together.aggregate([rank.execute(output) for rank in self.ranks])))
        if len(self.in_flight) >= self.ahead:
            self.take_in()

    def take_in(self) -> None:
        for outputs in self.scheduler.update_from_output(*self.in_flight.popleft()).values():
            for one in outputs.outputs:
                self.said[one.request_id] += one.new_token_ids
            stats = outputs.scheduler_stats
            for name, value in ((stats and stats.kv_connector_stats) or {}).items():
                self.counted[name] = self.counted.get(name, 0) + value

    def close(self) -> None:
        for rank in self.ranks:
            rank.connector.shutdown()
        self.scheduler.connector.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_none_hash(sha256)
    return llama(tmp_path_factory.mktemp("llama"))


KINDS = {
    "one step": {"asynchronous": False, "ahead": 1, "stages": 1, "ranks": 1},
    "asynchronous": {"asynchronous": True, "ahead": 2, "stages": 1, "ranks": 1},
    "asynchronous ranks": {"asynchronous": True, "ahead": 2, "stages": 1, "ranks": 2},
    "stages": {"asynchronous": False, "ahead": 2, "stages": 2, "ranks": 1},
    "stages of ranks": {"asynchronous": False, "ahead": 2, "stages": 2, "ranks": 2},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_forward_pass_reads_a_wrong_byte(tmp_path: Path, model: Path, kind: str, seed: int) -> None:
    draw = random.Random(seed)
    shared = [[draw.randrange(1000) for _ in range(draw.choice((40, 96, 130, 200)))] for _ in range(6)]
    engine = Engine(tmp_path, model, **KINDS[kind], prefixes=seed % 2 == 0)

    def drop() -> None:
        if draw.random() < 0.004:
            draw.choice(engine.ranks).connector._worker._cache.drop()

    for rank in engine.ranks:
        rank.between = drop
    asked: dict[str, tuple[list[int], int]] = {}
    aborted = set()
    try:
        for number in range(60):
            name = f"r{number}"
            tokens = draw.choice(shared) + [draw.randrange(1000) for _ in range(draw.randrange(1, 60))]
            asked[name] = (tokens, draw.randrange(1, 40))
            engine.add(name, *asked[name])
            for _ in range(draw.randrange(8)):
                engine.step()
            if draw.random() < 0.1:
                for rank in engine.ranks:
                    rank.connector._worker._caches.flush()
                damage(tmp_path, 300_000)
            if draw.random() < 0.1:
                aborted.add(name)
                engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        for _ in range(5000):
            if not engine.scheduler.has_unfinished_requests():
                break
            engine.step()
        while engine.in_flight:
            engine.take_in()
    finally:
        engine.close()
    for name, (tokens, count) in asked.items():
        right = list(tokens)
        for _ in range(count):
            right.append(following(right))
        said = engine.said[name]
        assert said == right[len(tokens) :][: len(said)]
        assert name in aborted or len(said) == count

    assert engine.counted["loaded_tokens"] > 0
    assert engine.counted["hit_tokens"] >= 0
