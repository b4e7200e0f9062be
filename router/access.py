"""Who may call what: the rule that all edges share. Knows keys, nothing of HTTP or gRPC.

Without any key the server is open. What shows all tenants is for the admin key, and where there are API keys
but no admin key, for nobody.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable

from ellm.router.errors import Forbidden, Unauthorized
from ellm.router.key_ring import KeyRing
from ellm.router.keys import ApiKey, check_plain_key


class Access:
    """Checks the key that a call brings."""

    def __init__(
        self, keys: KeyRing, admin_key: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ConfigError for an admin key that nobody can send, or anybody can."""
        if admin_key is not None:
            check_plain_key(admin_key, "router.admin_key")
        self._keys = keys
        self._admin_key = None if admin_key is None else admin_key.encode()
        self._clock = clock

    @property
    def guarded(self) -> bool:
        """Whether there is any key at all."""
        return self._admin_key is not None or self._keys.needed

    def owner(self, given: str, *, admin: bool = False) -> ApiKey | None:
        """Whose key it is; None where none is needed, and for the admin. Raises Unauthorized, Forbidden."""
        if admin and self.guarded:
            self._check_admin(given)
            return None
        if not self._keys.needed:
            return None
        owner = self._keys.find(given, self._clock())
        if owner is None:
            raise Unauthorized("this needs an API key: Authorization: Bearer KEY")
        return owner

    def _check_admin(self, given: str) -> None:
        if self._admin_key is None:
            raise Forbidden("this needs the admin key, and the server has none: set router.admin_key")
        if not hmac.compare_digest(given.encode(), self._admin_key):
            raise Unauthorized("this needs the admin key: Authorization: Bearer KEY")
