"""House rules that a program can check, read from the sources themselves.

A rule that no test states is a wish: what stands here is enforced, what stands in CONTRIBUTING.md alone is asked for.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import stratakv

ROOT = Path(__file__).parents[2]

RUST = sorted((ROOT / "rust").rglob("*.rs"))
RUST_TESTS = sorted(ROOT.glob("tests/*.rs")) + sorted(ROOT.glob("benches/*.rs"))
PYTHON = sorted((ROOT / "python").rglob("*.py"))
PYTHON_TESTS = [path for folder in ("tests/**", "benches", "deploy") for path in sorted(ROOT.glob(f"{folder}/*.py"))]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Imports point down: a part may use its own floor and those below.
FLOORS = [
    {"error", "sync"},
    {"arena", "block", "evict", "holders", "pool", "codec", "copy", "fused", "workers", "stats"},
    {"trie", "gpu", "ram", "ssd"},
    {"store"},
    {"py", "fuzzing"},
]

# Where raw memory, mappings, vector instructions or the Python C API leave no other way.
# A file that needs it no longer leaves the list.
UNSAFE_ALLOWED = {
    "block.rs",  # Carry-less multiply.
    "codec/avx512.rs",  # Vector loads and stores.
    "codec/neon.rs",  # Vector loads and stores, and instructions without a name.
    "codec/vector.rs",  # Calls of what needs certain instructions.
    "codec/x86.rs",  # Vector loads and stores.
    "copy.rs",  # Gather and scatter through the caller's strides.
    "fused.rs",  # The same, encoding and decoding.
    "gpu/cuda.rs",  # The driver's calls, and what it is told to do with memory.
    "gpu/cuda/launch.rs",  # The same.
    "gpu/check.rs",  # Memory that it shows to a device.
    "gpu/device.rs",  # Work on memory by its addresses, as every caller promises it is there.
    "gpu/ffi.rs",  # What cuda/kv_host.h declares.
    "gpu/host.rs",  # That work, done here.
    "arena.rs",  # The mapping.
    "trie/words.rs",  # Atomic words on a mapping.
    "ssd/queue.rs",  # Memory that transfers under way read and write.
    "fuzzing.rs",  # A view of memory, as every caller of the store makes one.
    "ssd/recover.rs",  # The same, of headers and footers.
    "ssd/uring.rs",  # The same, in the kernel's hands.
    "workers.rs",  # Work that outlives its borrow, as long as its caller waits.
    "store/read.rs",  # Slots and buffers that reads are under way to.
    "store/promote.rs",  # The same, for promotion.
    "store/write.rs",  # A slot's bytes while the SSD reads them.
    "store/gpu.rs",  # The address of RAM's arena, carried to other threads.
    "store/transfer.rs",  # A device's work on slots and the caller's tensors.
    "store/load.rs",  # A slot's bytes while a copy reads or writes them.
    "store/put.rs",  # The same, for put.
    "store/share.rs",  # The same, for records that nodes share.
    "store/view.rs",  # The same, for a view.
    "py/block.rs",  # Filling a buffer of the interpreter.
    "py/device_block.rs",  # DLPack capsules, and what they own.
    "py/tensor.rs",  # Buffers and DLPack capsules.
    "py/view.rs",  # What they promise of their memory.
}

# Modules that are a drawer rather than an idea.
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part(path: Path) -> str:
    """The part of the crate that a file belongs to: its folder, else its own name."""
    return path.relative_to(ROOT / "rust").parts[0].removesuffix(".rs")


def code(path: Path) -> list[str]:
    """The lines of a Rust file, comments and text between quotes blanked out."""
    lines = path.read_text().splitlines()
    return [re.sub(r'"(?:[^"\\]|\\.)*"', '""', re.sub(r"//.*", "", line)) for line in lines]


def tracked() -> list[Path]:
    """What is, or is about to be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.mark.parametrize("path", [each for each in RUST if each.name != "lib.rs"], ids=name)
def test_rust_imports_point_down(path: Path) -> None:
    floor_of = {each: floor for floor, parts in enumerate(FLOORS) for each in parts}
    assert part(path) in floor_of, "a new part needs a floor"
    body = "\n".join(code(path))
    used = set(re.findall(r"\bcrate::([a-z_]+)", body))
    for group in re.findall(r"\bcrate::\{(.*?)\};", body, flags=re.DOTALL):
        used |= set(re.findall(r"(?:^|,)\s*([a-z_]+)", group))
    up = {each for each in used & floor_of.keys() if floor_of[each] > floor_of[part(path)]}
    assert not up, f"{name(path)} imports upwards: {sorted(up)}"


@pytest.mark.parametrize("path", [each for each in RUST if part(each) != "py"], ids=name)
def test_only_the_py_folder_knows_pyo3(path: Path) -> None:
    assert not any("pyo3" in line for line in code(path))


def test_unsafe_appears_only_where_it_is_allowed() -> None:
    using = {path for path in RUST if any(re.search(r"\bunsafe\b", line) for line in code(path))}
    assert {str(path.relative_to(ROOT / "rust")) for path in using} == UNSAFE_ALLOWED


@pytest.mark.parametrize("path", RUST + RUST_TESTS, ids=name)
def test_every_unsafe_says_why_it_is_sound(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(code(path)):
        if not re.search(r"\bunsafe\b", line):
            continue
        # A comment above, with attributes and the statement's own first lines in between.
        above = "\n".join(lines[max(0, number - 6) : number + 1])
        wanted = r"# Safety" if re.search(r"\bunsafe fn\b|\bunsafe extern\b", line) else r"SAFETY:"
        assert re.search(wanted, above), f"{name(path)}:{number + 1} lacks a {wanted.strip('# :')} line"


@pytest.mark.parametrize("path", RUST + PYTHON + PYTHON_TESTS + RUST_TESTS, ids=name)
def test_a_file_holds_one_idea(path: Path) -> None:
    assert path.stem not in DRAWERS
    assert len(path.read_text().splitlines()) <= 700


@pytest.mark.parametrize("path", RUST, ids=name)
def test_a_rust_file_opens_with_its_idea(path: Path) -> None:
    assert path.read_text().startswith("//! ")


@pytest.mark.parametrize("path", PYTHON + PYTHON_TESTS, ids=name)
def test_a_python_file_opens_with_its_idea(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name(path)} has no page at the top"


def test_nothing_is_left_unfinished() -> None:
    unfinished = re.compile(
        "|".join((r"\bTO" r"DO\b", r"\bFIX" r"ME\b", r"\bXX" r"X\b", r"\btodo!", r"\bunimplemented!"))
    )
    found = [
        f"{name(path)}:{number}"
        for path in tracked()
        if path.suffix in {".rs", ".py", ".pyi", ".md", ".toml", ".sql", ".cu", ".h"}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unfinished.search(line) and path != Path(__file__)
    ]
    assert not found


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_stored_bytes_are_never_unpickled(path: Path) -> None:
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in [*node.names, ast.alias(getattr(node, "module", None) or "")]
    }
    assert not imported & {"pickle", "marshal", "shelve"}


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_every_list_of_public_names_is_sorted(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names = ast.literal_eval(node.value)
            assert names == sorted(names)


def test_the_readme_fits_in_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_document_that_is_linked_exists() -> None:
    for page in [*DOCS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("public", [each for each in stratakv.__all__ if not each.startswith("_")])
def test_the_documents_mention_every_public_name(public: str) -> None:
    text = "\n".join(page.read_text() for page in DOCS)
    assert re.search(rf"\b{public}\b", text)
