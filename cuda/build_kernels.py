"""Compiles the kernels to what the package carries, by NVRTC, and looks at what came out.

    kv_pool.cu, kv_compat.h ─▶ NVRTC ─▶ prebuilt/: a cubin for each family of GPUs, PTX for later ones, MANIFEST.json
                                         │ --check: the same bytes again, and
                                         ▼
    nvdisasm ─▶ memory is named, nothing spills, loads come before stores, no float operation is fused

The same source gives the same bytes in any folder, and no GPU is needed. `make kernels` runs it, and `make check` with
--check.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
SOURCES = ("kv_pool.cu", "kv_compat.h")
VERSION = (12, 9)
# Ampere, Hopper, and Blackwell in servers and in workstations; PTX is for what comes later.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80")
OPTIONS = ("-fmad=false", "-std=c++17", "--ptxas-options=-v")
# Registers of a thread, at most: what leaves room for as many threads as the kernels are made for.
CEILINGS = {"kv_copy": 40, "kv_encode": 80, "kv_decode": 80}
# Four loads of 16 bytes are under way before the first store.
LOADS_FIRST = 4


class Nvrtc:
    """NVIDIA's compiler, from its wheel.

    Raises:
        RuntimeError: it is not installed, or of another version.
    """

    def __init__(self) -> None:
        path = wheel("nvidia.cuda_nvrtc", "nvidia-cuda-nvrtc-cu12") / "lib" / "libnvrtc.so.12"
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        if (major.value, minor.value) != VERSION:
            raise RuntimeError(f"NVRTC {major.value}.{minor.value}: expected {VERSION[0]}.{VERSION[1]}")

    def compile(self, architecture: str) -> tuple[bytes, str]:
        """The image for an architecture, and what the compiler said of it.

        Raises:
            RuntimeError: the source has an error.
        """
        source, header = ((HERE / name).read_bytes() for name in SOURCES)
        program = ctypes.c_void_p()
        # By name: where the sources lie leaves no trace.
        names, headers = ((ctypes.c_char_p * 1)(text) for text in (SOURCES[1].encode(), header))
        self._call("nvrtcCreateProgram", ctypes.byref(program), source, SOURCES[0].encode(), 1, headers, names)
        options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in OPTIONS)]
        try:
            self._call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
        except RuntimeError as error:
            raise RuntimeError(f"{architecture}: {error}\n{self._text(program, 'ProgramLog').decode()}") from None
        image = self._text(program, "PTX" if architecture.startswith("compute") else "CUBIN")
        log = self._text(program, "ProgramLog").decode()
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return image, log

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        # Texts end with a zero, cubins with what they end with.
        return text.raw if what == "CUBIN" else text.raw.rstrip(b"\0")

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} returned {status}")


def wheel(package: str, project: str) -> Path:
    """Where a wheel's files lie.

    Raises:
        RuntimeError: it is not installed.
    """
    found = importlib.util.find_spec(package.partition(".")[0]) and importlib.util.find_spec(package)
    if not found or not found.submodule_search_locations:
        raise RuntimeError(f"{project} is not installed: make kernels installs it")
    return Path(next(iter(found.submodule_search_locations)))


def sha256(data: bytes) -> str:
    """The digest by which the manifest knows a file."""
    return hashlib.sha256(data).hexdigest()


def image_name(architecture: str) -> str:
    """The file of an architecture's image."""
    return f"{architecture}.ptx" if architecture.startswith("compute") else f"{architecture}.cubin"


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel, by what ptxas said."""
    found: dict[str, dict[str, int]] = {}
    kernel = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = match[1]
            found[kernel] = {}
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[kernel]["spilled_bytes"] = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            found[kernel]["registers"] = int(match[1])
    return found


def build() -> dict[str, bytes]:
    """All files of prebuilt/, by name."""
    nvrtc = Nvrtc()
    files, kernels = {}, {}
    for architecture in ARCHITECTURES:
        name = image_name(architecture)
        files[name], log = nvrtc.compile(architecture)
        if found := resources(log):
            kernels[name] = found
    manifest = {
        "compiler": f"NVRTC {VERSION[0]}.{VERSION[1]} (nvidia-cuda-nvrtc-cu12 12.9.86)",
        "options": list(OPTIONS),
        "sources": {name: sha256((HERE / name).read_bytes()) for name in SOURCES},
        "images": {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()},
        "kernels": kernels,
    }
    files["MANIFEST.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    return files


def instructions(image: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel of a cubin, without operands.

    Raises:
        RuntimeError: nvdisasm is not installed, or reads no such image.
    """
    nvdisasm = wheel("nvidia.cu13", "nvidia-cuda-nvdisasm") / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        run = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"nvdisasm: {run.stderr.strip()}")
    found: dict[str, list[str]] = {}
    kernel = ""
    for line in run.stdout.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)|^//-+\s+\.text\.(\w+)", line):
            kernel = match[1] or match[2]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", line):
            found.setdefault(kernel, []).append(match[1])
    return found


def code_faults(name: str, kernels: dict[str, list[str]]) -> Iterator[str]:
    """What a cubin's instructions should not be."""
    if set(kernels) != set(CEILINGS):
        yield f"{name}: kernels {sorted(kernels)}, expected {sorted(CEILINGS)}"
    for kernel, code in kernels.items():
        for operation in code:
            if re.match(r"(LD|ST|ATOM|RED)(\.|$)", operation) and not operation.startswith("RED.E.OR"):
                yield f"{name} {kernel}: {operation}, whose address space nobody named"
            if re.match(r"(LDL|STL)(\.|$)", operation):
                yield f"{name} {kernel}: {operation}, local memory"
    # There is a loop for what four do not divide, which may stand before.
    most = loads = 0
    for operation in kernels.get("kv_copy", []):
        if operation.startswith("LDG.E.128"):
            loads += 1
        elif operation.startswith("STG"):
            most, loads = max(most, loads), 0
    if most < LOADS_FIRST:
        yield f"{name} kv_copy: {most} loads of 16 bytes before a store, expected {LOADS_FIRST}"


def ptx_faults(name: str, text: str) -> Iterator[str]:
    """What PTX should not be: there every operation on floats is written as it was asked for."""
    for wanted in ("div.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32", "cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):
        if wanted not in text:
            yield f"{name}: no {wanted}"
    for match in re.finditer(r"\b(?:fma\.[\w.]+|mad\.rn\.f\d+|\w+\.[\w.]*(?:ftz|approx|full)\.f\d+)", text):
        yield f"{name}: {match[0]}, which rounds otherwise"


def faults(files: dict[str, bytes]) -> Iterator[str]:
    """What is wrong with images that were just built."""
    there = {path.name: path.read_bytes() for path in PREBUILT.iterdir()} if PREBUILT.is_dir() else {}
    for name in sorted(files.keys() | there.keys()):
        if files.get(name) != there.get(name):
            yield f"prebuilt/{name} is not what its sources give: make kernels"
    kernels = json.loads(files["MANIFEST.json"])["kernels"]
    for architecture in ARCHITECTURES:
        name = image_name(architecture)
        if name.endswith(".ptx"):
            yield from ptx_faults(name, files[name].decode())
            continue
        yield from code_faults(name, instructions(files[name]))
        for kernel, ceiling in CEILINGS.items():
            used = kernels[name][kernel]
            if used["registers"] > ceiling:
                yield f"{name} {kernel}: {used['registers']} registers, {ceiling} at most"
            if used["spilled_bytes"]:
                yield f"{name} {kernel}: {used['spilled_bytes']} bytes spilled"


def main() -> int:
    """Builds, and either writes what came out or compares it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing: compare, and look at the instructions")
    check = parser.parse_args().check
    files = build()
    if not check:
        PREBUILT.mkdir(exist_ok=True)
        for path in PREBUILT.iterdir():
            path.unlink()
        for name, data in files.items():
            (PREBUILT / name).write_bytes(data)
    found = list(faults(files))
    for fault in found:
        print(f"build_kernels: {fault}", file=sys.stderr)
    if not found:
        print(f"build_kernels: {len(files)} files, {sum(map(len, files.values()))} bytes, as they should be")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
