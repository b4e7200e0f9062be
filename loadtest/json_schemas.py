"""Structured output on a suite of JSON schemas: which are refused and why, whether every answer validates.

    python -m ellm.loadtest.json_schemas FOLDER --sample 500

FOLDER holds schemas as *.json, in folders (JSONSchemaBench's `data`, say). Each goes the way of a request:
the router's check, then a sequence's place in the grammar as a worker keeps it, and its tokens are drawn by
the sampler under the masks. The logits are noise that leans to what closes strings, lists and objects: no
model would try more of a grammar's corners, nor end sooner. Where a string does not end since noise does not
come upon its pattern, the noise leans to an example of that pattern (`json_endings`), under the same masks.
`jsonschema` judges what comes out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ellm.kernels import dispatch
from ellm.loadtest.json_endings import Endings
from ellm.loadtest.result import Result, Row
from ellm.router.grammar_check import GrammarCheck
from ellm.router.openai.structured import json_grammar
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import InvalidRequest
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import NewSequence
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.grammar import Grammars
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.sampler import Sampler
from ellm.worker.model.sequences import SequenceState

BUNDLED = Path(__file__).resolve().parent.parent / "deploy" / "bundled" / "pydoc-5m"
CLOSING = 12.0  # added to the logits of what closes something
PATIENCE = 300  # tokens of noise before it is told how a string may end
EVERY = 25  # tokens, from then on
DEEP = 3  # levels
KINDS = ("valid", "refused", "cut", "invalid", "failed", "unjudged")
ABOUT = """\
{sample} schemas of JSONSchemaBench, drawn at random: each goes the way of a request, from the router's check
to the sampler under the masks, with the bundled model's tokens, and logits that are noise leaning to what
closes strings, lists and objects; from {patience} tokens on it is told, every {every}, how a string may end
whose pattern it has not come upon, as a model would know. `valid`: the answer came to its end and
`jsonschema` accepts it; `refused`: with a reason, before anything ran; `cut`: not at its end after {tokens}
tokens; `invalid`: the judge refuses it; `failed`: ended in the middle; `unjudged`: no schema that the judge
can read."""


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: str  # valid, invalid, cut (max_tokens), failed (in the middle), refused, unjudged (no schema)
    reason: str = ""
    compile_s: float = 0.0  # of CPU, as is the next
    tokens: int = 0
    mask_s: float = 0.0  # the dearest mask
    told: int = 0  # strings whose end noise was told


class Suite:
    """Answers schemas with one model's tokens and no model."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._arch: Architecture = read_architecture(folder)
        self._tokenizer = Tokenizer.load(folder)
        self._check = GrammarCheck(self._tokenizer)
        self._grammars = Grammars(folder, self._arch.vocab_size, self._arch.eos_token_ids)
        ops = dispatch.select("cpu", jit=False, deterministic=False)
        self._sampler = Sampler(ops, self._arch.vocab_size, torch.device("cpu"))
        self._max_tokens = max_tokens
        closing = torch.zeros(self._arch.vocab_size)
        for token in range(self._tokenizer.vocab_size):
            data = self._tokenizer.token_bytes(token)
            if data and set(data) <= set(b'"]}'):
                closing[token] = CLOSING
        closing[list(self._arch.eos_token_ids)] = 2 * CLOSING
        self._closing = closing

    async def grammar(self, schema: Any) -> str:
        """As a router has it. Raises InvalidRequest."""
        grammar = json_grammar(schema, "schema")
        await self._check.check(grammar, "schema")
        return grammar

    async def outcome(self, schema: Any, seed: int) -> Outcome:
        start = time.process_time()
        try:
            grammar = await self.grammar(schema)
        except InvalidRequest as error:
            return Outcome("refused", error.message)
        compile_s = time.process_time() - start
        sampling = SamplingParams(temperature=1.0, seed=seed, grammar=grammar)
        place = self._grammars.begin(grammar, ())
        sequence = NewSequence(0, (1,), (), sampling, 0)
        state = SequenceState(0, sequence, self._arch.eos_token_ids, self._arch.vocab_size, place)
        ids, dearest, told = list[int](), 0.0, 0
        draw = Noise(self._closing, seed, Endings(schema, self._tokenizer))
        follower = self._grammars.compile(grammar).deep_copy()
        row = np.zeros((self._arch.vocab_size + 31) // 32, dtype=np.int32)
        while len(ids) < self._max_tokens:
            begun = time.process_time()
            place.fill(row)
            dearest = max(dearest, time.process_time() - begun)
            if len(ids) >= PATIENCE and len(ids) % EVERY == 0:
                told += draw.tell(follower)
            ids.append(int(self._sampler.sample(draw.logits(), [state], [len(ids)]).item()))
            place.add(ids[-1])
            if place.error is not None:
                return Outcome("failed", place.error, compile_s, len(ids), dearest, told)
            if ids[-1] in self._arch.eos_token_ids:
                judged = judge(schema, self._tokenizer.decode(ids))
                return replace(judged, compile_s=compile_s, tokens=len(ids), mask_s=dearest, told=told)
            follower.consume_token(ids[-1])
        return Outcome("cut", self._tokenizer.decode(ids)[-100:], compile_s, len(ids), dearest, told)


class Noise:
    """What stands for a model."""

    def __init__(self, closing: torch.Tensor, seed: int, endings: Endings) -> None:
        self._closing, self._endings = closing, endings
        self._generator = torch.Generator().manual_seed(seed)
        self._next: list[int] = []

    def tell(self, matcher: Any) -> bool:
        """Let it write the end of a string next, where one is known."""
        if not self._next:
            self._next = self._endings.next(matcher)
            return bool(self._next)
        return False

    def logits(self) -> torch.Tensor:
        """[1, V]."""
        found = 3 * torch.randn(1, len(self._closing), generator=self._generator) + self._closing
        if self._next:
            found[0, self._next.pop(0)] += 100 * CLOSING
        return found


def judge(schema: Any, text: str) -> Outcome:
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return Outcome("invalid", f"{str(error)[:200]} in {text[:200]}")
    except Exception as error:  # a schema that the judge itself cannot read
        return Outcome("unjudged", f"{type(error).__name__}: {str(error)[:100]}")
    return Outcome("valid")


def depth(schema: Any) -> int:
    """Of nested `properties`, `items` and alternatives."""
    if isinstance(schema, dict):
        inner = max((depth(value) for value in schema.values()), default=0)
        return inner + (schema.get("type") in ("object", "array"))
    if isinstance(schema, list):
        return max(map(depth, schema), default=0)
    return 0


@dataclass(slots=True)
class Tally:
    """Of the schemas of one folder, or of one kind."""

    schemas: int = 0
    tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, found: Outcome) -> None:
        self.schemas += 1
        self.tokens += found.tokens
        self.kinds[found.kind] += 1

    def row(self, name: str) -> Row:
        counts = {kind: self.kinds[kind] for kind in KINDS}
        share = self.kinds["refused"] / max(1, self.schemas)
        return {"schemas of": name, "number": self.schemas, **counts, "refused, %": 100 * share}


async def _run(paths: list[Path], suite: Suite) -> tuple[list[Row], list[str], list[dict[str, Any]]]:
    """Rows, notes, and every outcome."""
    folders: dict[str, Tally] = {}
    deep, whole, raw = Tally(), Tally(), list[dict[str, Any]]()
    for i, path in enumerate(paths):
        schema = json.loads(path.read_text())
        found = await suite.outcome(schema, i)
        levels, name = depth(schema), path.parent.name
        for tally in (folders.setdefault(name, Tally()), whole, *([deep] if levels >= DEEP else [])):
            tally.add(found)
        raw.append({"schema": f"{name}/{path.name}", "depth": levels, **asdict(found)})
        if found.kind != "valid":
            print(f"{found.kind:9} {name}/{path.name}: {found.reason}", flush=True)
    rows = [folders[name].row(name) for name in sorted(folders)]
    rows += [deep.row(f"{DEEP} levels and more"), whole.row("all")]
    return rows, notes_of(raw), raw


def notes_of(raw: list[dict[str, Any]]) -> list[str]:
    """Why what was refused, what it cost, and each answer that is none."""
    reasons = Counter(_class_of(one["reason"]) for one in raw if one["kind"] == "refused")
    slowest, dearest = max(one["compile_s"] for one in raw), max(one["mask_s"] for one in raw)
    tokens = sum(one["tokens"] for one in raw)
    return [
        "refused: " + "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
        f"{tokens:,} tokens; CPU of the slowest compilation {1e3 * slowest:.0f} ms, "
        f"of the dearest mask {1e3 * dearest:.0f} ms",
        f"{sum(one['told'] > 0 for one in raw)} answers had strings whose end noise was told",
        *(
            f"{one['kind']}: {one['schema']} {one['reason']}"[:300].strip()
            for one in raw
            if one["kind"] not in ("valid", "refused")
        ),
    ]


async def _refused_of_all(paths: list[Path], suite: Suite) -> str:
    """A note; nothing is generated."""
    refused = 0
    for path in paths:
        try:
            await suite.grammar(json.loads(path.read_text()))
        except InvalidRequest:
            refused += 1
    share = 100 * refused / len(paths)
    return f"of all {len(paths):,} schemas of the suite {refused:,} are refused ({share:.1f} %)"


def _class_of(reason: str) -> str:
    """A refusal without what is its schema's own."""
    return reason.partition(": ")[2].partition(" while processing")[0].partition(". Enable")[0][:80]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Structured output on a suite of JSON schemas.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=4000)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--all", action="store_true", help="count the refusals of the whole suite, too")
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args(words)
    paths = sorted(asked.folder.rglob("*.json"))
    random.Random(asked.seed).shuffle(paths)
    suite = Suite(asked.model, asked.max_tokens)
    rows, notes, raw = asyncio.run(_run(paths[: asked.sample], suite))
    if asked.all:
        notes.append(asyncio.run(_refused_of_all(paths, suite)))
    print(json.dumps(rows[-2:], indent=1))
    result = Result(
        name="json-schemas",
        title="Structured output on JSONSchemaBench",
        about=ABOUT.format(sample=asked.sample, tokens=asked.max_tokens, patience=PATIENCE, every=EVERY),
        command=f"python -m ellm.loadtest.json_schemas FOLDER {' '.join(words[1:])}".strip(),
        rows=rows,
        seed=asked.seed,
        notes=notes,
        raw=raw,
    )
    if not asked.no_write:
        print(f"wrote {result.write()}")


if __name__ == "__main__":
    main(sys.argv[1:])
