"""transformers, chat: turns say what they say without the cache, and hash only what is new.

The reference is a conversation over `model.generate` with the same template, in fp32.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import stratakv  # noqa: E402 (after the skips)
from llamas import BLOCK, SPECIAL, TEMPLATE, settings, tokenizer, words  # noqa: E402
from stratakv.demo import model_home  # noqa: E402
from stratakv.integrations.transformers import Chat, generate, geometry  # noqa: E402

pytestmark = [
    pytest.mark.engines,
    # torch and transformers warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]

SYSTEM = words(60, seed=50)
QUESTIONS = [words(20, seed) for seed in range(4)]
# Of words alone: a special token is no text, so an answer with one would be written otherwise than it was made.
GREEDY = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "suppress_tokens": list(range(len(SPECIAL)))}


def uncached(model: Any, tokens: Any, questions: list[str], system: str | None = SYSTEM, **options: Any) -> list[str]:
    """What a model says turn by turn, without any cache of ours."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        inputs = tokens.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, **{**GREEDY, **options})
        answers.append(tokens.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_turns_are_the_uncached_ones_and_reuse_all_that_was_said(model: Any, cache: stratakv.ModelCache) -> None:
    chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    expected = uncached(model, tokenizer(), QUESTIONS)
    said = 0
    for question, answer in zip(QUESTIONS, expected, strict=True):
        assert chat.send(question) == answer
        # All of the turns before but the last token of the last answer, which was never an input.
        assert chat.restored.tokens == (max(said - 1, 0)) // BLOCK * BLOCK
        said = len(tokenizer().apply_chat_template(chat.messages, tokenize=True, return_dict=True)["input_ids"]) - 1
    assert [each["content"] for each in chat.messages if each["role"] == "assistant"] == expected
    assert [each["role"] for each in chat.messages] == ["system"] + ["user", "assistant"] * 4


def test_an_answer_depends_on_the_turns_before(model: Any) -> None:
    one = uncached(model, tokenizer(), QUESTIONS[:2])
    other = uncached(model, tokenizer(), [words(20, 77), QUESTIONS[1]])
    assert one[1] != other[1]


def test_turns_go_on_with_one_sequence(model: Any, cache: stratakv.ModelCache) -> None:
    chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    chat.send(QUESTIONS[0])
    sequence = chat._hashed.sequence
    tokens = len(sequence)
    chat.send(QUESTIONS[1])
    assert chat._hashed.sequence is sequence
    assert len(sequence) == tokens + len((" ".join(["<|end|>", "<|user|>", QUESTIONS[1], "<|end|>"])).split()) + 2 + 24


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(model: Any, cache: stratakv.ModelCache) -> None:
    # Six blocks with what the template puts around it.
    question = words(96 - 65, 8)
    for tokens in (0, 95):
        chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
        assert chat.send(question) == uncached(model, tokenizer(), [question])[0]
        assert chat.restored.tokens == tokens


def test_a_template_that_rewrites_history_starts_a_new_sequence(model: Any, cache: stratakv.ModelCache) -> None:
    # It shows the model no more than the last words of what it said.
    rewriting = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'][-20:].split(' ', 1)[1] if message['role'] == 'assistant' else message['content'] }}",
    )
    chat = Chat(model, cache, tokenizer(rewriting), system=SYSTEM, **GREEDY)
    sequences = []
    for question, answer in zip(QUESTIONS, uncached(model, tokenizer(rewriting), QUESTIONS), strict=True):
        assert chat.send(question) == answer
        sequences.append(chat._hashed.sequence)
    assert len(set(map(id, sequences))) == 4
    # The first question is written as before, and found.
    assert chat.restored.tokens >= (60 + 20) // BLOCK * BLOCK


def test_after_a_restart_a_conversation_goes_on_from_ssd(model: Any, tmp_path: Path) -> None:
    expected = uncached(model, tokenizer(), QUESTIONS)
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for question, answer in zip(QUESTIONS, expected, strict=True):
        with stratakv.open(settings(tmp_path)) as caches:
            cache = caches.register("llama", geometry(model))
            chat = Chat(model, cache, tokenizer(), messages=messages, **GREEDY)
            assert chat.send(question) == answer
            if len(messages) > 1:
                assert set(chat.restored.explanation.blocks) == {"ssd"}
                assert chat.restored.tokens > 60 + 20 + 25 - BLOCK
            messages = chat.messages
            caches.flush()


def test_a_streamed_turn_is_a_turn(model: Any, cache: stratakv.ModelCache) -> None:
    chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    expected = uncached(model, tokenizer(), QUESTIONS[:3])
    pieces = list(chat.stream(QUESTIONS[0]))
    assert len(pieces) > 1
    assert "".join(pieces) == expected[0]
    assert chat.send(QUESTIONS[1]) == expected[1]
    assert "".join(chat.stream(QUESTIONS[2])) == expected[2]
    assert chat.restored.tokens > 0


def test_an_answer_that_nobody_listened_to_the_end_is_what_the_conversation_goes_on_with(
    model: Any, cache: stratakv.ModelCache
) -> None:
    chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    whole = uncached(model, tokenizer(), QUESTIONS[:1], max_new_tokens=600)[0]
    for _ in chat.stream(QUESTIONS[0], max_new_tokens=600):
        break
    part = chat.messages[-1]["content"]
    assert part
    assert whole.startswith(part)
    assert len(part) < len(whole)
    messages = [*chat.messages, {"role": "user", "content": QUESTIONS[1]}]
    inputs = tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert chat.send(QUESTIONS[1]) == tokenizer().decode(expected, skip_special_tokens=True)
    assert chat.restored.tokens >= 80


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model: Any, cache: stratakv.ModelCache) -> None:
    chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    chat.send(QUESTIONS[0])
    before = list(chat.messages)

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        chat.send(QUESTIONS[3], stopping_criteria=[fails])
    with pytest.raises(ValueError, match="no"):
        list(chat.stream(QUESTIONS[3], stopping_criteria=[fails]))
    with pytest.raises(stratakv.InputError, match="num_beams"):
        chat.send(QUESTIONS[3], num_beams=2)
    assert chat.messages == before
    assert chat.send(QUESTIONS[1]) == uncached(model, tokenizer(), QUESTIONS[:2])[1]


def test_a_conversation_outlives_its_cache(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = uncached(model, tokenizer(), QUESTIONS)
    with stratakv.open(settings(tmp_path)) as caches:
        chat = Chat(model, caches.register("llama", geometry(model)), tokenizer(), system=SYSTEM, **GREEDY)
        assert chat.send(QUESTIONS[0]) == expected[0]
    with caplog.at_level(logging.WARNING):
        assert [chat.send(question) for question in QUESTIONS[1:]] == expected[1:]
    assert chat.restored.tokens == 0
    assert "not restored" in caplog.text


def test_after_a_drop_turns_are_computed_once_and_found_again(model: Any, cache: stratakv.ModelCache) -> None:
    expected = uncached(model, tokenizer(), QUESTIONS)
    chat = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    found = []
    for question, answer in zip(QUESTIONS, expected, strict=True):
        if question == QUESTIONS[1]:
            cache.drop()
        assert chat.send(question) == answer
        found.append(chat.restored.tokens)
    assert found[:3] == [0, 0, 0]
    assert found[3] > 100


@pytest.mark.parametrize("other", [{"adapter": "lora"}, {"tenant": "other"}])
def test_conversations_of_others_are_not_found(model: Any, cache: stratakv.ModelCache, other: dict[str, str]) -> None:
    Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY).send(QUESTIONS[0])
    same = Chat(model, cache, tokenizer(), system=SYSTEM, **GREEDY)
    same.send(QUESTIONS[0])
    assert same.restored.tokens > 0
    theirs = Chat(model, cache, tokenizer(), system=SYSTEM, **other, **GREEDY)
    theirs.send(QUESTIONS[0])
    assert theirs.restored.tokens == 0
    theirs.send(QUESTIONS[1])
    assert theirs.restored.tokens > 0


def test_sampling_and_static_caches_are_passed_through(model: Any, cache: stratakv.ModelCache) -> None:
    sampled = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 30}
    torch.manual_seed(3)
    expected = uncached(model, tokenizer(), QUESTIONS[:2], **{"do_sample": True, "temperature": 0.8, "top_k": 30})
    for _ in range(2):
        torch.manual_seed(3)
        chat = Chat(model, cache, tokenizer(), system=SYSTEM, **sampled, cache_implementation="static")
        assert [chat.send(question) for question in QUESTIONS[:2]] == expected
        assert type(chat.restored.past_key_values) is transformers.StaticCache
    short = Chat(model, cache, tokenizer(), **GREEDY)
    assert len(short.send(QUESTIONS[0], max_new_tokens=3).split()) == 3
    assert short.messages[0]["role"] == "user"


def test_two_system_prompts_are_refused(model: Any, cache: stratakv.ModelCache) -> None:
    with pytest.raises(stratakv.InputError, match="system"):
        Chat(model, cache, tokenizer(), system="a", messages=[{"role": "system", "content": "b"}])


SMOLLM2 = model_home() / "smollm2-135m-instruct"


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="SmolLM2-135M-Instruct is not on this machine")
@pytest.mark.timeout(300)
def test_smollm2_says_the_same_in_turns_and_in_batches(tmp_path: Path) -> None:
    words_ = transformers.AutoTokenizer.from_pretrained(SMOLLM2, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    greedy = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": None}
    page = (Path(stratakv.__file__).parent / "demo" / "__init__.py").read_text()
    system = "You answer questions about this text.\n" + " ".join(re.findall(r"[a-z ]{20,}", page))[:600]
    questions = ["What is it about?", "Say that in three words."]
    expected = uncached(model, words_, questions, system=system, **greedy)
    asked = [[{"role": "system", "content": system}, {"role": "user", "content": each}] for each in questions]
    batch = words_.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, padding=True, return_tensors="pt", return_dict=True
    )
    plain = model.generate(**batch, **greedy)
    for turns in ((0, 1), (1, 2)):
        with stratakv.open(settings(tmp_path)) as caches:
            cache = caches.register("smollm2", geometry(model))
            if turns[0] == 0:
                chat = Chat(model, cache, words_, system=system, **greedy)
            else:
                chat = Chat(model, cache, words_, messages=chat.messages, **greedy)
            for question, answer in zip(questions[slice(*turns)], expected[slice(*turns)], strict=True):
                assert chat.send(question) == answer
            assert (chat.restored.tokens > 100) == (turns[0] > 0)
            found: list[Any] = []
            assert torch.equal(generate(model, cache, **batch, on_restored=found.append, **greedy), plain)
            assert min(found[0].rows) > 80
            caches.flush()
