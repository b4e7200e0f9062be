"""What a method uses of gRPC's context of a call."""

from __future__ import annotations

from typing import Any, Protocol


class CallContext(Protocol):
    """A part of grpc.aio.ServicerContext, which has no types."""

    async def send_initial_metadata(self, metadata: tuple[Any, ...]) -> None: ...
    async def write(self, message: Any) -> None: ...
    async def abort(self, code: Any, details: str, trailing_metadata: tuple[Any, ...]) -> None:
        """Raises AbortError."""
        ...

    def trailing_metadata(self) -> tuple[Any, ...] | None: ...
    def set_trailing_metadata(self, metadata: tuple[Any, ...]) -> None: ...
