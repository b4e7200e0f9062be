"""Text comes in whole characters, and its pieces add up to what the tokenizer's own decoder says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_server import FOLDER
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from ellm.router.detokenize import REPLACEMENT, WindowDetokenizer
from ellm.router.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer.load(FOLDER)


def sentencepiece(strip: bool = True) -> Tokenizer:
    """As Llama 2's: words behind a low line, single bytes where there is no word."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "▁the", "▁a", "b", "c", "▁▁", "é", "你", "e", ".", "\n", "▁world"]
    fast = FastTokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    fast.add_special_tokens(["<s>", "</s>"])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return Tokenizer(fast)


def metaspace() -> Tokenizer:
    """A decoder that has no table here."""
    words = ["<unk>", "▁the", "▁world", "s", ".", "▁", "é"]
    fast = FastTokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    fast.decoder = decoders.Metaspace()
    return Tokenizer(fast)


SENTENCEPIECE = sentencepiece()
GEMMA = sentencepiece(strip=False)
METASPACE = metaspace()


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool = True) -> list[str]:
    """Feed `ids` in chunks; `cuts` are chunk lengths, used in turn."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    out, at, turn = [], 0, 0
    while at < len(ids):
        step = cuts[turn % len(cuts)]
        out.append(detokenizer.feed(ids[at : at + step]))
        at, turn = at + step, turn + 1
    return [*out, detokenizer.flush()]


@given(st.text(max_size=60), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_any_text_comes_back(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    found = pieces(BYTE_LEVEL, ids, cuts)
    assert "".join(found) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in found)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE, GEMMA], ids=["bytes", "fallback", "gemma"])
@given(data=st.data())
def test_any_ids_add_up_to_the_full_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Random ids are mostly malformed UTF-8; the whole decoder's replacements must come out all the same."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cuts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    skip = data.draw(st.booleans())
    assert "".join(pieces(tokenizer, ids, cuts, skip)) == tokenizer._decode_whole(ids, skip)


@given(
    st.lists(st.integers(0, 255).map(lambda b: b + 3), max_size=24), st.lists(st.integers(1, 3), min_size=1)
)
def test_runs_of_bytes_add_up_to_the_full_decode(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(SENTENCEPIECE, ids, cuts)) == SENTENCEPIECE._decode_whole(ids, True)


@given(st.lists(st.integers(1, 6), max_size=20))
def test_an_unknown_decoder_goes_by_windows(ids: list[int]) -> None:
    assert isinstance(METASPACE.detokenizer(), WindowDetokenizer)
    assert "".join(pieces(METASPACE, ids, [1])) == METASPACE._decode_whole(ids, True)


def test_half_a_character_waits() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    ids = BYTE_LEVEL.encode("🎉", add_special_tokens=False)
    assert len(ids) > 1
    assert [detokenizer.feed([i]) for i in ids] == [""] * (len(ids) - 1) + ["🎉"]


def test_half_a_character_at_the_end_is_replaced() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    ids = BYTE_LEVEL.encode("🎉", add_special_tokens=False)
    assert detokenizer.feed(ids[:-1]) == ""
    assert detokenizer.flush() == REPLACEMENT


def test_a_leading_space_goes_only_at_the_start_of_a_text() -> None:
    the = SENTENCEPIECE._fast.token_to_id("▁the")
    assert SENTENCEPIECE.decode([the]) == "the"
    assert SENTENCEPIECE.detokenizer(after=[the]).feed([the]) == " the"
    # A prompt of special tokens alone shows nothing: the text starts behind it.
    assert SENTENCEPIECE.detokenizer(after=[1]).feed([the]) == "the"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = BYTE_LEVEL.encode("Hi")
    assert BYTE_LEVEL.decode(ids) == "Hi"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "<|bos|>Hi"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    beyond = BYTE_LEVEL.vocab_size + 5
    assert BYTE_LEVEL.decode([beyond]) == ""
    assert BYTE_LEVEL.decode([beyond, *BYTE_LEVEL.encode("Hi")]) == "Hi"
    assert SENTENCEPIECE.decode([SENTENCEPIECE.vocab_size + 1]) == ""
    assert BYTE_LEVEL.token_bytes(beyond) == b""


def test_added_tokens_are_text_not_bytes() -> None:
    fast = FastTokenizer(models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
    fast.decoder = decoders.ByteLevel()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_tokens(["<think>", "思考"])
    fast.post_processor = processors.ByteLevel()
    tokenizer = Tokenizer(fast)
    assert tokenizer.decode([2, 3, 0, 1, 0]) == "<think>思考a a" == fast.decode([2, 3, 0, 1, 0])
