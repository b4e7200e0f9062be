"""A tokenizer for `simulated:` workers, which have no checkpoint: each byte of a text is a token, and every
further id of the vocabulary reads as a short word of its own."""

from __future__ import annotations

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from ellm.router.detokenize import byte_alphabet
from ellm.router.openai.chat_template import ChatTemplate
from ellm.router.tokenizer import Tokenizer

PREFIX = "simulated:"
END = "<|end|>"  # id 0, as the simulated executor has it
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def simulated_tokenizer(path: str) -> Tokenizer:
    """`path` is the model's: `simulated:...,vocab_size=N`."""
    size = next(
        (int(p[11:]) for p in path.removeprefix(PREFIX).split(",") if p.startswith("vocab_size=")), 32_000
    )
    words = [END, *byte_alphabet(), *(f"Ġt{i}" for i in range(257, size))]
    fast = FastTokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    fast.add_special_tokens([END])
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(fast, ChatTemplate(TEMPLATE, {}))
