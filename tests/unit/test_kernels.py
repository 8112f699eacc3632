"""The images of the GPU's kernels belong to their sources, and what looks at them sees what is wrong."""

import json
import runpy
from pathlib import Path

CUDA = Path(__file__).parents[2] / "cuda"
BUILD = runpy.run_path(str(CUDA / "build_kernels.py"))
MANIFEST = json.loads((CUDA / "prebuilt" / "MANIFEST.json").read_text(encoding="utf-8"))


def test_images_were_compiled_from_the_sources_that_are_there() -> None:
    sources = {name: BUILD["sha256"]((CUDA / name).read_bytes()) for name in BUILD["SOURCES"]}
    assert sources == MANIFEST["sources"], "make kernels"
    assert MANIFEST["options"] == list(BUILD["OPTIONS"]), "make kernels"


def test_images_are_those_of_the_manifest_and_no_others() -> None:
    there = {path.name: path.read_bytes() for path in (CUDA / "prebuilt").iterdir() if path.name != "MANIFEST.json"}
    assert there.keys() == MANIFEST["images"].keys() == {BUILD["image_name"](name) for name in BUILD["ARCHITECTURES"]}
    for name, data in there.items():
        assert MANIFEST["images"][name] == {"sha256": BUILD["sha256"](data), "bytes": len(data)}


def test_ptx_that_fuses_or_approximates_is_found() -> None:
    text = (CUDA / "prebuilt" / "compute_80.ptx").read_text(encoding="utf-8")
    assert not list(BUILD["ptx_faults"]("it", text))
    for wrong in ("fma.rn.f32", "mul.ftz.f32", "div.approx.f32", "div.full.f32", "mad.rn.f32", "div.rn.ftz.f32"):
        assert list(BUILD["ptx_faults"]("it", text.replace("div.rn.f32", wrong, 1))), wrong
    assert list(BUILD["ptx_faults"]("it", text.replace("div.rn.f32", "mul.rn.f32")))


def test_instructions_that_spill_name_no_memory_or_load_one_by_one_are_found() -> None:
    copy = ["LDG.E.128"] * 4 + ["STG.E.128"] * 4 + ["EXIT"]
    good = {"kv_copy": copy, "kv_encode": ["LDS", "RED.E.OR.STRONG.GPU"], "kv_decode": ["STG.E.128"]}

    def faults(**kernels: list[str]) -> list[str]:
        return list(BUILD["code_faults"]("it", good | kernels))

    assert not faults()
    for wrong in ("LD.E.128", "ST.E.64", "LDL", "STL.64", "LDL.LU", "ATOM.E.OR"):
        assert faults(kv_decode=[wrong]), wrong
    assert faults(kv_copy=["LDG.E.128", "STG.E.128"] * 4)
    assert faults(another=["EXIT"])
