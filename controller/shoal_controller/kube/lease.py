"""Who leads: a `Lease` object, held by renewing it.

    not held, or not renewed for its duration as seen from here  → take it
    held by this replica                                         → renew it every `retry_s`
    not renewed within `renew_s`                                 → it is lost: stop at once

Clocks of machines differ, so nobody compares the time that a lease names with its own: a lease has run out when this
process saw no new version of it for its duration (as in client-go's leaderelection).

The rule: `renew_s` < `duration_s`, so who cannot renew has stopped before another may take over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from shoal.errors import ShoalError
from shoal_controller.kube.api import LEASES, Api, ApiError, Object

log = logging.getLogger(__name__)


class LeaseLost(ShoalError):
    """Another replica may lead now: stop."""


@dataclass(frozen=True, slots=True)
class Timing:
    """In seconds. A leader that died is followed after at most `duration_s` + `retry_s` and the time to start."""

    duration_s: float = 8.0
    renew_s: float = 5.0
    retry_s: float = 1.5

    def __post_init__(self) -> None:
        assert self.retry_s < self.renew_s < self.duration_s


@dataclass(frozen=True, slots=True)
class Seen:
    """A version of the lease and when this process first saw it, on its monotonic clock."""

    version: str
    holder: str
    duration_s: float
    seen_s: float


def observe(item: Object, before: Seen | None, now_s: float) -> Seen:
    """The lease as read now."""
    spec, version = item.get("spec") or {}, item["metadata"]["resourceVersion"]
    if before is not None and before.version == version:
        return before
    return Seen(version, spec.get("holderIdentity") or "", float(spec.get("leaseDurationSeconds") or 0), now_s)


def may_take(seen: Seen, identity: str, now_s: float) -> bool:
    """Whether this replica may write itself into the lease."""
    return seen.holder in ("", identity) or now_s - seen.seen_s >= seen.duration_s


class Election:
    """One replica's part in the election. Call `acquire`, then run `hold` beside the work, then `release`.

    Attributes:
        is_leader: as far as this replica knows.
        renewals: attempts by how they ended.
    """

    def __init__(
        self,
        api: Api,
        *,
        namespace: str,
        name: str,
        identity: str,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self._api = api
        self._namespace = namespace
        self._name = name
        self._timing = timing or Timing()
        self._clock = clock
        self._seen: Seen | None = None
        self._item: Object = {}
        self._renewed_s = 0.0
        self.is_leader = False
        self.renewals = {"ok": 0, "failed": 0}

    @property
    def transitions(self) -> int:
        """How often the holder changed, as the lease says."""
        return int((self._item.get("spec") or {}).get("leaseTransitions") or 0)

    @property
    def age_s(self) -> float:
        """Since the lease was renewed, as seen from here; 0 before it was seen."""
        if self.is_leader:
            return self._clock() - self._renewed_s
        return 0.0 if self._seen is None else self._clock() - self._seen.seen_s

    async def acquire(self) -> None:
        """Wait until this replica leads. A server that does not answer is asked again."""
        told = ""
        while True:
            try:
                if await self._try_to_take():
                    self.is_leader = True
                    log.info("%s leads", self.identity)
                    return
            except ApiError as error:
                if not error.is_conflict:
                    log.warning("the lease %s cannot be had: %s", self._name, error)
            holder = self._seen.holder if self._seen else ""
            if holder != told:
                log.info("%s leads; %s stands by", holder or "nobody", self.identity)
                told = holder
            await asyncio.sleep(self._timing.retry_s)

    async def hold(self) -> None:
        """Renew for ever.

        Raises:
            LeaseLost: it could not be renewed in time, or another replica has it.
        """
        reason = "no answer"
        while True:
            await asyncio.sleep(self._timing.retry_s)
            left_s = self._renewed_s + self._timing.renew_s - self._clock()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    await self._renew()
                self.renewals["ok"] += 1
            except (ApiError, TimeoutError) as error:
                self.renewals["failed"] += 1
                reason = str(error) or reason
                if isinstance(error, ApiError) and error.is_conflict and not await self._is_mine():
                    self.is_leader = False
                    raise LeaseLost(f"{self._holder()} leads now: {self.identity} ends") from error
                if self._clock() - self._renewed_s >= self._timing.renew_s:
                    self.is_leader = False
                    raise LeaseLost(
                        f"the lease {self._name} could not be renewed for {self._timing.renew_s:g} s ({reason}): "
                        f"{self.identity} ends, so that another can lead"
                    ) from error
                log.warning("the lease %s is not renewed yet: %s", self._name, reason)

    async def release(self) -> None:
        """Let another replica lead at once, if this one does. Where that fails the lease runs out by itself."""
        self.is_leader = False
        if self._holder() != self.identity:
            return
        try:
            async with asyncio.timeout(self._timing.retry_s):
                await self._write("", is_new_holder=False)
        except (ApiError, TimeoutError) as error:
            log.info("the lease %s was not given back: %s", self._name, error)

    async def _try_to_take(self) -> bool:
        now_s = self._clock()
        try:
            self._item = await self._api.get(LEASES, self._name, namespace=self._namespace)
        except ApiError as error:
            if not error.is_missing:
                raise
            made = {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": {"name": self._name}}
            self._item = await self._api.create(
                LEASES, {**made, "spec": self._spec(self.identity, {})}, namespace=self._namespace
            )
        else:
            self._seen = observe(self._item, self._seen, now_s)
            if not may_take(self._seen, self.identity, now_s):
                return False
            await self._write(self.identity, is_new_holder=self._seen.holder != self.identity)
        self._renewed_s = now_s
        return True

    async def _renew(self) -> None:
        asked_s = self._clock()
        await self._write(self.identity, is_new_holder=False)
        self._renewed_s = asked_s

    async def _is_mine(self) -> bool:
        """After a conflict: a write of ours may have arrived without that we heard of it."""
        try:
            self._item = await self._api.get(LEASES, self._name, namespace=self._namespace)
        except ApiError:
            return True  # not known; what is known is when it was renewed last
        return self._holder() == self.identity

    def _holder(self) -> str:
        return (self._item.get("spec") or {}).get("holderIdentity") or "nobody"

    async def _write(self, holder: str, *, is_new_holder: bool) -> None:
        spec = self._spec(holder, self._item.get("spec") or {}, is_new_holder=is_new_holder)
        self._item = await self._api.replace(LEASES, {**self._item, "spec": spec}, namespace=self._namespace)

    def _spec(self, holder: str, before: Object, *, is_new_holder: bool = True) -> Object:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        return {
            **before,
            "holderIdentity": holder,
            # An integer for the API; a lease that was given back counts as run out.
            "leaseDurationSeconds": max(1, round(self._timing.duration_s)) if holder else 1,
            "renewTime": now,
            "acquireTime": now if is_new_holder else before.get("acquireTime", now),
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (1 if is_new_holder and before else 0),
        }
