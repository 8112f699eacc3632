"""The manager against a model of it that fits in a dictionary: with room for all, what was put is found, no more."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import stratakv
from stores import geometry, kv_of

NAMES = ("a", "b")
# Each turn is 8 tokens, so that prompts share prefixes.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
    lambda turns: np.repeat(np.array(turns, np.int64), 8) * 100 + np.arange(8 * len(turns))
)
SPACES = st.sampled_from((("", ""), ("", ""), ("adapter", "tenant")))
SHAPES = [geometry(), geometry(layers=1, head_dim=16, block_tokens=8)]
STRATEGIES = ("fair", "proportional", "priority", "dynamic")


class Manager(RuleBasedStateMachine):
    """Whatever is done, in whatever order."""

    @initialize()
    def begin(self) -> None:
        """Opens an empty store."""
        self.folder = Path(tempfile.mkdtemp())
        self.caches = self.reopened()
        # By model: its shape, its version, what is cached by adapter and tenant, and what was counted since it came.
        self.stored: dict[str, tuple[stratakv.Geometry, str, dict[tuple[str, str], set[bytes]]]] = {}
        self.absent: dict[tuple[str, stratakv.Geometry, str], dict[tuple[str, str], set[bytes]]] = {}
        self.asked: dict[str, int] = {}

    def be_there(self, name: str) -> None:
        if name not in self.stored:
            self.register(name, SHAPES[NAMES.index(name)], "1")

    def reopened(self) -> stratakv.CacheManager:
        return stratakv.open(
            stratakv.Config(
                ram=stratakv.RamConfig(capacity_bytes="32MiB"),
                ssd=stratakv.SsdConfig(path=self.folder, capacity_bytes="64MiB", segment_bytes="256KiB"),
                models=stratakv.ModelsConfig(interval_s=0),
                store=stratakv.StoreConfig(threads=1),
            )
        )

    @rule(name=st.sampled_from(NAMES), shape=st.sampled_from(SHAPES), version=st.sampled_from(("1", "2")))
    def register(self, name: str, shape: stratakv.Geometry, version: str) -> None:
        """Registers a model, or is refused as another has its name."""
        if name in self.stored and self.stored[name][:2] != (shape, version):
            with pytest.raises(stratakv.ModelExistsError):
                self.caches.register(name, shape, weights_version=version)
            return
        cache = self.caches.register(name, shape, weights_version=version)
        if name not in self.stored:
            self.stored[name] = (shape, version, self.absent.pop((name, shape, version), {}))
            self.asked[name] = 0
        assert self.caches[name] is cache

    @rule(name=st.sampled_from(NAMES))
    def unregister(self, name: str) -> None:
        """Frees a model, with all that it stored."""
        if name not in self.stored:
            with pytest.raises(stratakv.ModelNotFoundError):
                self.caches.unregister(name)
            return
        self.caches.unregister(name)
        del self.stored[name], self.asked[name]

    @rule(name=st.sampled_from(NAMES), tokens=PROMPTS, space=SPACES)
    def put(self, name: str, tokens: np.ndarray, space: tuple[str, str]) -> None:
        """Stores a prompt."""
        adapter, tenant = space
        self.be_there(name)
        shape, _, held = self.stored[name]
        kv = kv_of(tokens, shape)
        assert self.caches[name].put(tokens, kv, layout="LKHND", adapter=adapter, tenant=tenant) == len(tokens)
        ends = range(shape.block_tokens, len(tokens) + 1, shape.block_tokens)
        held.setdefault((adapter, tenant), set()).update(tokens[:end].tobytes() for end in ends)

    @rule(name=st.sampled_from(NAMES), tokens=PROMPTS, space=SPACES)
    def match(self, name: str, tokens: np.ndarray, space: tuple[str, str]) -> None:
        """What was put of a prompt is found, and is right."""
        adapter, tenant = space
        self.be_there(name)
        shape, _, held = self.stored[name]
        cache, known = self.caches[name], held.get((adapter, tenant), set())
        ends = range(shape.block_tokens, len(tokens) + 1, shape.block_tokens)
        expected = max((end for end in ends if tokens[:end].tobytes() in known), default=0)
        out = np.zeros((shape.layers, 2, shape.kv_heads, len(tokens), shape.head_dim), np.float32)
        with cache.match(tokens, adapter=adapter, tenant=tenant) as hit:
            assert hit.tokens == expected
            assert hit.load(out, layout="LKHND") == expected
        assert np.array_equal(out[:, :, :, :expected], kv_of(tokens, shape)[:, :, :, :expected])
        self.asked[name] += len(tokens) // shape.block_tokens

    @rule(name=st.sampled_from(NAMES), space=SPACES)
    def drop(self, name: str, space: tuple[str, str]) -> None:
        """Forgets a namespace."""
        adapter, tenant = space
        if name in self.stored:
            known = self.stored[name][2].pop((adapter, tenant), set())
            assert self.caches[name].drop(adapter=adapter, tenant=tenant) == len(known)

    @rule(name=st.sampled_from(NAMES), prompts=st.lists(st.tuples(PROMPTS, SPACES), min_size=1, max_size=6))
    def serve(self, name: str, prompts: list[tuple[np.ndarray, tuple[str, str]]]) -> None:
        """As an engine does: asks, and stores what it computed."""
        for tokens, space in prompts:
            self.match(name, tokens, space)
            self.put(name, tokens, space)

    @rule(strategy=st.sampled_from(STRATEGIES))
    def divide(self, strategy: str) -> None:
        """Another rule for the tiers."""
        self.caches.set_models(strategy=strategy)

    @rule()
    def reopen(self) -> None:
        """What was stored is there for whoever registers as before."""
        self.caches.close()
        self.caches = self.reopened()
        for name, (shape, version, held) in self.stored.items():
            self.absent[name, shape, version] = held
        self.stored, self.asked = {}, {}

    @invariant()
    def counts_agree(self) -> None:
        """Each model's counters are what was asked of it, and its blocks those that are stored."""
        if not hasattr(self, "caches"):
            return
        assert sorted(self.caches) == sorted(self.stored)
        total = self.caches.stats()
        for name in self.stored:
            stats = self.caches[name].stats()
            assert stats.asked_blocks == self.asked[name] == stats.hit_blocks + stats.miss_blocks
            assert stats.miss_blocks == sum(stats.missed.values())
        blocks = sum(len(each) for _, _, held in self.stored.values() for each in held.values())
        assert self.caches.status().index_blocks == blocks
        assert total.asked_blocks >= sum(self.asked.values())
        assert sum(self.caches.status().ram_shares.values()) in (0, 32 << 20)

    def teardown(self) -> None:
        """Closes the store."""
        if hasattr(self, "caches"):
            self.caches.close()
            shutil.rmtree(self.folder)


TestManager = Manager.TestCase
TestManager.settings = settings(
    deadline=None, max_examples=15, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
