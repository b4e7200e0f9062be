"""One request on its way through the router: its place in the admission count, and its sequences.

Makes the sequences of a Job, sends each prompt's to a worker, and whatever happens ends them all.
"""

from __future__ import annotations

import uuid

from ellm.router.dispatch import Dispatcher
from ellm.router.openai.answer import Usage
from ellm.router.openai.convert import Job
from ellm.router.policies import RoutedRequest
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.sequence import Sink
from ellm.router.stop_strings import StopMatcher, StopStrings
from ellm.router.tokenizer import Tokenizer


class Generation:
    """`close` must follow, whatever happens in between."""

    def __init__(
        self,
        job: Job,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        arrived_at: float,
        salt: str = "",
        session_id: str | None = None,
    ) -> None:
        """Raises QueueFull, and then holds nothing."""
        self.job = job
        self.sequences: list[LiveSequence] = []
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self.arrived_at = arrived_at
        self._salt = salt
        self._session_id = session_id
        self.tenant = ""  # stands for the API key
        dispatcher.admission.enter(job.num_sequences)
        self._admitted = job.num_sequences

    async def submit(self, sink: Sink) -> None:
        """Send all sequences, those of one prompt to one worker. Raises Unavailable, WorkerFailed."""
        n = self.job.n
        self.sequences = self._make(sink)
        for i, prompt in enumerate(self.job.prompts):
            routed = RoutedRequest(prompt.ids, n, self._session_id, self._salt)
            await self._dispatcher.submit(self.sequences[i * n : (i + 1) * n], routed)

    def close(self) -> None:
        """Abort what is not finished, and leave the admission count. Idempotent."""
        for sequence in self.sequences:
            if sequence.finished is None:
                self._dispatcher.cancel(sequence)
        self._dispatcher.admission.leave(self._admitted)
        self._admitted = 0

    def usage(self) -> Usage:
        """As of now."""
        generated = 0 if self.job.score_only else sum(len(s.output_ids) for s in self.sequences)
        return Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in self.job.prompts),
            completion_tokens=generated,
            cached_tokens=sum(s.num_cached_tokens for s in self.sequences[:: self.job.n]),
        )

    def _make(self, sink: Sink) -> list[LiveSequence]:
        job, prefix = self.job, uuid.uuid4().hex
        strings = StopStrings(job.stop) if job.stop else None
        made = []
        for index in range(job.num_sequences):
            prompt, sampling = job.prompts[index // job.n], job.sampling[index // job.n]
            detokenizer = self._tokenizer.detokenizer(
                skip_special_tokens=job.skip_special_tokens, after=prompt.ids
            )
            sequence = LiveSequence(f"{prefix}-{index}", index, prompt.ids, sampling, sink, detokenizer)
            sequence.choice_index = index % job.n
            sequence.salt = self._salt
            sequence.session_id = self._session_id
            sequence.tenant = self.tenant
            sequence.arrived_at = self.arrived_at
            sequence.serve_at(job.level)
            matcher = None if strings is None else StopMatcher(strings, job.include_stop)
            sequence.stop_at(matcher, job.include_stop)
            made.append(sequence)
        return made
