"""The slot pool against one atomic addition; see benches/index.rs."""

from __future__ import annotations

from index import main

if __name__ == "__main__":
    main("pool", ("pool",))
