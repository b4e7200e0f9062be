"""A generating request's way in and out, the same for every edge: counted, charged, converted, and ended.

Knows neither HTTP nor gRPC: an edge brings a body of OpenAI's fields and takes a Generation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ellm.router.audit import RequestRecord
from ellm.router.errors import unknown_model
from ellm.router.generation import Generation
from ellm.router.keys import ApiKey
from ellm.router.openai.convert import Job
from ellm.router.service_level import with_headers

if TYPE_CHECKING:
    from ellm.router.exchange import Kind, Service


@asynccontextmanager
async def admitted(
    service: Service,
    kind: Kind,
    body: Any,
    headers: Iterable[tuple[bytes, bytes]],
    key: ApiKey | None,
    session_id: str | None = None,
    record: RequestRecord | None = None,
) -> AsyncIterator[Generation]:
    """The generation that a body asks for; whatever happens, it is ended and its rest paid back. `record` is
    told of it. Raises InvalidRequest, ModelNotFound, QueueFull, RateLimited, Unavailable."""
    if key is not None and not key.may_use(service.model):  # an edge that has found it should not have
        raise unknown_model(service.model)
    if record is not None:
        record.model = service.model
    arrived_at = service.dispatcher.clock()
    # From here on the request is counted: its body is held while it waits for a worker and is tokenised.
    admission = service.dispatcher.admission
    admission.enter(1)
    try:
        if key is not None:
            service.tenants.enter(key, arrived_at)
        job = await service.job(kind, with_headers(body, headers))
    finally:
        admission.leave(1)
    job = in_class(job, key)
    tenant = "" if key is None else key.id
    salt = cache_salt(key, job)
    generation = Generation(job, service.dispatcher, service.tokenizer, arrived_at, salt, session_id)
    generation.tenant = tenant
    reserved = _reserve(service, key, job)
    entry = service.timelines.begin(service.model, generation)
    try:
        yield generation
    finally:
        generation.close()
        service.timelines.end(entry)
        if record is not None:
            record.ended(generation)
        if key is not None:
            used, now = generation.usage().completion_tokens, service.dispatcher.clock()
            service.tenants.settle(key, reserved, used, now)


def cache_salt(key: ApiKey | None, job: Job) -> str:
    """Prompts of one salt share what is cached: a key's own, and what the request says within it. No key's
    salt has a slash."""
    return f"{'' if key is None else key.salt}/{job.cache_salt}" if key is not None or job.cache_salt else ""


def in_class(job: Job, key: ApiKey | None) -> Job:
    """The job in its key's class: no request of a key runs before those of the class."""
    if key is None or key.priority is None:
        return job
    asked = job.level.priority
    priority = key.priority if asked == 0 else max(asked, key.priority)
    return replace(job, level=replace(job.level, priority=priority))


def _reserve(service: Service, key: ApiKey | None, job: Job) -> int:
    """Charge the key for all that the job may use; returns how much of that is output."""
    output = job.n * sum(sampling.max_tokens for sampling in job.sampling)
    if key is not None:
        prompt, now = sum(len(prompt.ids) for prompt in job.prompts), service.dispatcher.clock()
        service.tenants.reserve(key, job.num_sequences, prompt, output, now)
    return output
