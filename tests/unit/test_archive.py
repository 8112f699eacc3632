"""`stratakv ssd`: a directory is shown, checked, exported and imported, and never changed by being looked at."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

import stratakv
from stores import assert_right, config, geometry, kv_of, loaded, tokens_of
from stratakv.cli import main

SHAPE = geometry(block_tokens=8, head_dim=32)
PROMPTS = 12


def fill(path: Path, secret: str | None = None) -> None:
    with stratakv.open(config(path, secret=secret)) as caches:
        for name in ("one", "two"):
            cache = caches.register(name, SHAPE, weights_version="7")
            for seed in range(PROMPTS):
                tokens = tokens_of(seed, 64)
                cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND")


def found(path: Path, secret: str | None = None) -> list[int]:
    """Tokens found of each prompt of model `one`; their bytes are right."""
    with stratakv.open(config(path, secret=secret)) as caches:
        cache = caches.register("one", SHAPE, weights_version="7")
        for seed in range(PROMPTS):
            assert_right(cache, tokens_of(seed, 64))
        return [loaded(cache, tokens_of(seed, 64))[1].loaded_tokens for seed in range(PROMPTS)]


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in path.iterdir()}


def records_of(path: Path) -> list[int]:
    """Where records lie in a model's file."""
    data = path.read_bytes()
    return [at for at in range(0, len(data), 4096) if data[at : at + 4] == b"SKVR"]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_inspect_tells_what_is_there_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    before = contents(tmp_path)
    assert main(["ssd", "inspect", str(tmp_path), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert not seen["in_use"]
    assert seen["damaged"] == []
    assert [model["name"] for model in seen["models"]] == ["one", "two"]
    for model in seen["models"]:
        assert (model["blocks"], model["prefixes"], model["longest_blocks"]) == (PROMPTS * 8, PROMPTS, 8)
        assert model["geometry"] == [SHAPE.layers, SHAPE.planes, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.dtype, 8]
        assert model["weights_version"] == "7"
        assert 0 < model["record_bytes"] < model["file_bytes"]
        assert abs(model["written_s"][1] - (tmp_path / "store").stat().st_mtime) < 600
    assert main(["ssd", "inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "one (7)" in page
    assert f"{PROMPTS * 8} of {PROMPTS} prefixes, the longest of 64 tokens" in page
    assert main(["ssd", "verify", str(tmp_path)]) == 0
    assert f"{PROMPTS * 16} records" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_directory_that_is_in_use_can_be_looked_at_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "store")
    with stratakv.open(config(tmp_path / "store")):
        assert main(["ssd", "inspect", str(tmp_path / "store")]) == 0
        assert ", in use by a process" in capsys.readouterr().out
        assert main(["ssd", "verify", str(tmp_path / "store")]) == 0
        assert main(["ssd", "export", str(tmp_path / "store"), str(tmp_path / "out.tar")]) == 2
        assert "close it there first" in capsys.readouterr().err
        assert not (tmp_path / "out.tar").exists()


def test_verify_names_every_record_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    file = sorted(tmp_path.glob("*.kv"))[0]
    places = records_of(file)
    assert len(places) == PROMPTS * 8
    # A byte of a payload, of a header and of token ids.
    for place, at in ((places[3], 4000), (places[40], 60), (places[77], 256)):
        flip(file, place + at)
    assert main(["ssd", "verify", str(tmp_path)]) == 1
    page = capsys.readouterr().out
    assert f"{PROMPTS * 16 - 3} records" in page
    assert "3 wrong" in page
    assert main(["ssd", "verify", str(tmp_path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["records"], said["damaged"]) == (PROMPTS * 16 - 3, [])
    assert [(row["path"], row["at"]) for row in said["wrong"]] == [(str(file), places[n]) for n in (3, 40, 77)]
    for n in (3, 40, 77):
        assert f"{file}: record at {places[n]}: its checksum or its header is wrong" in page


def test_what_is_left_of_a_damaged_directory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    one, two = sorted(tmp_path.glob("*.kv"))
    for page in (0, 4096):
        flip(one, page + 100)
    data = two.read_bytes()
    flip(two, data.index(b"SKVF") + 70)
    assert main(["ssd", "inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert f"{one}: not a model's file, or its head is damaged" in page
    assert "1 without a footer" in page
    assert f"{PROMPTS * 8} of {PROMPTS} prefixes" in page
    assert main(["ssd", "verify", str(tmp_path)]) == 1


@pytest.mark.parametrize("secret", [None, "of the fleet"])
def test_a_cache_moves_in_a_file(tmp_path: Path, secret: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    here, file, there = tmp_path / "here", tmp_path / "cache.tar", tmp_path / "there"
    fill(here, secret)
    before = contents(here)
    assert main(["ssd", "export", str(here), str(file)]) == 0
    assert ("set the same where it is imported" in capsys.readouterr().out) == (secret is not None)
    assert contents(here) == before
    assert file.stat().st_mode & 0o777 == 0o600
    assert main(["ssd", "import", str(there), str(file)]) == 0
    assert f"{PROMPTS * 16} records" in capsys.readouterr().out
    assert found(there, secret) == found(here, secret) == [64] * PROMPTS
    assert main(["ssd", "import", str(there), str(file)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_was_damaged_on_the_way_is_told_and_never_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, file, there = tmp_path / "here", tmp_path / "cache.tar", tmp_path / "there"
    fill(here)
    assert main(["ssd", "export", str(here), str(file)]) == 0
    data = file.read_bytes()
    flip(file, data.index(b"SKVR") + 5000)
    capsys.readouterr()
    assert main(["ssd", "import", str(there), str(file)]) == 1
    assert "1 wrong" in capsys.readouterr().out
    assert sum(found(there)) >= (PROMPTS - 1) * 64


@pytest.mark.parametrize(
    "name", ["../escaped", "lock", "store/x", "a.kv.head", f"{'0' * 32}.kv.-1", f"{'0' * 32}.kv.x"]
)
def test_a_file_that_is_no_export_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cache.tar"
    with tarfile.open(file, "w") as out:
        member = tarfile.TarInfo(name)
        member.size = 4
        out.addfile(member, io.BytesIO(b"evil"))
    assert main(["ssd", "import", str(tmp_path / "there"), str(file)]) == 2
    assert "is no part of an export of a store" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache.tar", "there"]


def test_what_is_no_store_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert main(["ssd", command, str(tmp_path)]) == 2
        assert "is no directory of a store" in capsys.readouterr().err
    (tmp_path / "store").write_bytes(b"x" * 8192)
    assert main(["ssd", "inspect", str(tmp_path)]) == 2
    assert "is no superblock" in capsys.readouterr().err
    assert main(["ssd", "import", str(tmp_path / "new"), str(tmp_path / "absent.tar")]) == 2
    (tmp_path / "empty.tar").write_bytes(b"")
    assert main(["ssd", "import", str(tmp_path / "new2"), str(tmp_path / "empty.tar")]) == 2
