"""What tests share of KV events: an engine that publishes them as vLLM's ZmqEventPublisher does."""

from __future__ import annotations

import threading
from collections import deque

import msgspec
import zmq


def stored(names: list[int], parent: int | None, tokens: list[int], **more: object) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    } | more


def batch(*events: object) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


class Engine:
    """Publishes as vLLM's ZmqEventPublisher does, and answers for what was missed."""

    def __init__(self, kept: int = 100) -> None:
        context = zmq.Context.instance()
        self.publisher, self.replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self.publisher.bind("tcp://127.0.0.1:*")
        self.replay.bind("tcp://127.0.0.1:*")
        self.names = tuple(s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (self.publisher, self.replay))
        self.kept: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self.sequence = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.answer, daemon=True)
        self.thread.start()

    def endpoints(self) -> tuple[str, str]:
        return self.names

    def send(self, payload: bytes, *, lose: bool = False) -> None:
        self.kept.append((self.sequence, payload))
        if not lose:
            self.publisher.send_multipart([b"", self.sequence.to_bytes(8, "big"), payload])
        self.sequence += 1

    def answer(self) -> None:
        while not self.stop.is_set():
            if self.replay.poll(20):
                who, _, first = self.replay.recv_multipart()
                for number, payload in list(self.kept):
                    if number >= int.from_bytes(first, "big"):
                        self.replay.send_multipart([who, b"", b"", number.to_bytes(8, "big"), payload])
                self.replay.send_multipart([who, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        self.publisher.close(linger=0)
        self.replay.close(linger=0)
