"""One request, ready to run: what a body was converted to, whatever the client's words were."""

from __future__ import annotations

from dataclasses import dataclass

from ellm.router.openai.chat_parser import Parsing
from ellm.router.service_level import NO_PROMISE, ServiceLevel
from ellm.worker.api.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """What goes in: ids, and the text they came from where there was one."""

    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """What a request must fit, and what it is promised where it does not say."""

    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    default_level: ServiceLevel = NO_PROMISE
    grammars: bool = False  # workers obey grammars


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run: `n` sequences of each prompt."""

    prompts: tuple[Prompt, ...]
    sampling: tuple[SamplingParams, ...]  # of each prompt
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    echo: bool
    score_only: bool  # the one token that is generated is dropped (max_tokens = 0 with echo)
    cache_salt: str
    level: ServiceLevel
    pace: bool | None  # a paced stream; None: as the router is set
    parsing: Parsing | None = None  # of a chat whose answer is more than its text

    @property
    def num_sequences(self) -> int:
        return self.n * len(self.prompts)
