"""Runs a few prompts through an engine in this process and prints the text as it comes.

The text of the first unfinished prompt is printed at once; the others wait, so that texts do not mix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field

from ellm.router.detokenize import Detokenizer
from ellm.router.stop_strings import StopMatcher, StopStrings
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.output import FinishReason, SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import LoadedEngine, load_engine
from ellm.worker.model.hub import local_folder


@dataclass(slots=True)
class Text:
    """One prompt's text so far."""

    prompt: str
    num_prompt_tokens: int
    detokenizer: Detokenizer
    matcher: StopMatcher
    pieces: list[str] = field(default_factory=list)
    num_printed: int = 0  # pieces
    num_tokens: int = 0
    finish_reason: FinishReason | None = None

    def take(self, output: SequenceOutput) -> None:
        """Add one step's tokens; an ending stop token is no text."""
        self.num_tokens += len(output.token_ids)
        shown = output.token_ids[:-1] if output.stop_token_id is not None else output.token_ids
        self._push(self.detokenizer.feed(shown))
        if output.finish_reason is not None and self.finish_reason is None:
            self._push(self.detokenizer.flush())
            if self.finish_reason is None:
                self.pieces.append(self.matcher.flush())
                self.finish_reason = output.finish_reason

    def _push(self, text: str) -> None:
        if self.finish_reason is None:
            self.pieces.append(self.matcher.push(text))
            if self.matcher.matched:
                self.finish_reason = "stop"


def generate(args: argparse.Namespace, worker: WorkerConfig, prompts: list[str]) -> int:
    """Print the completions of all prompts; returns the exit code. Raises EllmError."""
    tokenizer = Tokenizer.load(local_folder(worker.model.path, worker.model.revision))
    engine = load_engine(worker, lambda what, share: None)
    texts: dict[str, Text] = {}
    stops = StopStrings(args.stop)
    now = time.monotonic()
    try:
        for number, prompt in enumerate(prompts):
            shown = tokenizer.render_chat([{"role": "user", "content": prompt}]) if args.chat else prompt
            ids = tokenizer.encode(shown, add_special_tokens=not args.chat)
            sampling = sampling_params(args, worker, engine, len(ids))
            engine.core.add_request(EngineRequest(str(number), tuple(ids), sampling), now)
            detokenizer = tokenizer.detokenizer(after=ids)
            texts[str(number)] = Text(prompt, len(ids), detokenizer, StopMatcher(stops))
        run_engine(engine, texts, Printer(list(texts.values()), args.json))
    finally:
        engine.executor.close()
    if args.stats:
        seconds, tokens = time.monotonic() - now, sum(text.num_tokens for text in texts.values())
        print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def sampling_params(
    args: argparse.Namespace, worker: WorkerConfig, engine: LoadedEngine, num_prompt: int
) -> SamplingParams:
    """From the flags; `max_tokens` is cut to what fits behind the prompt."""
    room = engine.core.max_total_tokens - num_prompt
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=worker.model.seed if args.seed is None else args.seed,
        min_tokens=args.min_tokens,
        max_tokens=max(1, min(args.max_tokens, room)),
        ignore_eos=args.ignore_eos,
    )


class Printer:
    """Prints texts in the order of their prompts, each as far as it is known once it is its turn."""

    def __init__(self, texts: list[Text], as_json: bool) -> None:
        self._texts = texts
        self._json = as_json
        self._turn = 0

    def show(self) -> None:
        """Print what is new."""
        while self._turn < len(self._texts):
            text = self._texts[self._turn]
            if not self._json:
                self._print_pieces(text)
            if text.finish_reason is None:
                return
            print(json.dumps(as_dict(text)) if self._json else "", flush=True)
            self._turn += 1

    def _print_pieces(self, text: Text) -> None:
        if text.num_printed == 0 and len(self._texts) > 1 and text.pieces:
            print(f"[{self._turn + 1}] ", end="")
        print("".join(text.pieces[text.num_printed :]), end="", flush=True)
        text.num_printed = len(text.pieces)


def as_dict(text: Text) -> dict[str, object]:
    return {
        "prompt": text.prompt,
        "text": "".join(text.pieces),
        "finish_reason": text.finish_reason,
        "num_prompt_tokens": text.num_prompt_tokens,
        "num_tokens": text.num_tokens,
    }


def run_engine(engine: LoadedEngine, texts: dict[str, Text], printer: Printer) -> None:
    """Plan, execute and finish steps until every prompt is done."""
    core = engine.core
    while core.has_work:
        plan = core.begin_step(time.monotonic())
        assert plan is not None, "work, but nothing can run"
        result = engine.executor.execute(plan)
        for output in core.finish_step(plan, result, time.monotonic()):
            text = texts[output.request_id]
            text.take(output)
            if text.finish_reason is not None and output.finish_reason is None:
                core.abort(output.request_id, output.attempt, time.monotonic())
        printer.show()
