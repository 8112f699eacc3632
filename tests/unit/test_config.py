"""Settings: where they come from, and what is said about a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import stratakv
from stratakv.settings import parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        (" 1.5 MiB ", 3 << 19),
        ("512", 512),
        (4096, 4096),
        ("2tib", 2 << 40),
    ],
)
def test_a_size_is_bytes_or_text_with_a_unit(text: int | str, value: int) -> None:
    assert parse_bytes(text, "size") == value


@pytest.mark.parametrize("text", ["lots", "", "-1", "0", 0, -5, "8 GX", "1e9", None, True, 1.5])
def test_a_size_that_makes_no_sense_is_refused_by_name(text: object) -> None:
    with pytest.raises(stratakv.ConfigError, match=r"ram\.capacity_bytes is .*8GiB"):
        stratakv.RamConfig(capacity_bytes=text)


def test_the_environment_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text('[ram]\ncapacity_bytes = "1GiB"\n[ssd]\npolicy = "write_through"\npath = "here"\n')
    config = stratakv.Config.load(file, {"STRATAKV_RAM_CAPACITY_BYTES": "3GiB", "STRATAKV_SSD_ENABLED": "false"})
    assert config.ram.capacity_bytes == 3 << 30
    assert (config.ssd.policy, config.ssd.path, config.ssd.enabled) == ("write_through", Path("here"), False)
    assert config.ssd.capacity_bytes == 16 << 30


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("[ram]\ncapacity = 1", "ram.capacity_bytes"),
        ("[ssd]\npolice = 'x'", "ssd.policy"),
        ("[sdd]\npath = 'x'", "ssd"),
        ("[store]\nsecrets = 'x'", "store.secret"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path, text: str, near: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(stratakv.ConfigError, match=f"did you mean '{near}'"):
        stratakv.open(file)


def test_an_unknown_variable_of_a_section_names_the_nearest_valid_one() -> None:
    with pytest.raises(stratakv.ConfigError, match=r"ram\.capacity_bytes"):
        stratakv.Config.load(None, {"STRATAKV_RAM_CAPACITY": "1GiB"})


def test_a_file_that_is_absent_or_no_toml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(stratakv.ConfigError, match="cannot be read"):
        stratakv.open(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("ram = [")
    with pytest.raises(stratakv.ConfigError, match="is not TOML"):
        stratakv.open(tmp_path / "bad.toml")


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        stratakv.RamConfig().capacity_bytes = 1
    with pytest.raises(TypeError):
        stratakv.RamConfig(1)


@pytest.mark.parametrize("wrong", [{"policy": "sometimes"}, {"enabled": "yes"}, {"segment_bytes": "none"}])
def test_a_wrong_ssd_setting_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(stratakv.ConfigError, match=r"ssd\."):
        stratakv.SsdConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"threads": -1}, {"threads": "2"}, {"secret": ""}])
def test_a_wrong_store_setting_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(stratakv.ConfigError, match=r"store\."):
        stratakv.StoreConfig(**wrong)


def test_a_secret_is_shown_nowhere() -> None:
    assert "hunter2" not in repr(stratakv.Config(store=stratakv.StoreConfig(secret="hunter2")))


@pytest.mark.parametrize(
    "wrong",
    [{"layers": 0}, {"planes": 3}, {"dtype": "int4"}, {"block_tokens": 5000}, {"head_dim": 1.5}, {"kv_heads": True}],
)
def test_a_geometry_that_makes_no_sense_names_its_field(wrong: dict[str, object]) -> None:
    right = {"layers": 1, "kv_heads": 1, "head_dim": 8, "dtype": "fp16"}
    with pytest.raises(stratakv.InputError, match=f"geometry: {next(iter(wrong))} is"):
        stratakv.Geometry(**right | wrong)


def test_a_section_of_another_kind_is_refused() -> None:
    with pytest.raises(stratakv.ConfigError, match="ssd is None, expected a SsdConfig"):
        stratakv.Config(ssd=None)  # type: ignore[arg-type]


def test_an_unknown_eviction_policy_is_refused_with_the_list() -> None:
    with pytest.raises(stratakv.ConfigError, match="'fifo', expected one of lru, lfu, s3fifo, s3fifo_long, arc, wtin"):
        stratakv.RamConfig(eviction="fifo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tables",
    [
        {"dragonfly": "redis://:hunter2@host"},
        {"dragonfly": {"url": "hunter2@host:6379"}},
        {"postgres": {"url": "me:hunter2@host/x"}},
        {"qdrant": {"url": "me:hunter2@host:6333"}},
        {"qdrant": {"url": "http://me:hunter2@host:6333"}},
        {"store": {"secrets": "hunter2"}},
        {"store": {"secret": ["hunter2"]}},
        {"dragonfly": {"url": ["redis://:hunter2@host"]}},
    ],
)
def test_settings_that_are_refused_show_no_secret(tables: dict[str, object]) -> None:
    with pytest.raises(stratakv.ConfigError) as refused:
        stratakv.Config.load(tables=tables, environ={})
    assert "hunter2" not in str(refused.value)


def test_a_table_where_a_section_should_be_is_not_shown() -> None:
    with pytest.raises(stratakv.ConfigError, match="store is a dict, expected a StoreConfig"):
        stratakv.Config(store={"secret": "hunter2"})  # type: ignore[arg-type]
