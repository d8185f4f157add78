"""The admission webhook that puts the gate on new pods. Every replica serves it, and it asks nobody.

    POST /gate      AdmissionReview (admission.k8s.io/v1) → the same with a JSON patch

The rule: a pod that has not the label is let through whatever it is, and a pod whose text cannot be understood is
refused with what to write: the one who made it is told then and there, and not by a pod that waits for ever.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from shoal.errors import InvalidRequest, StoreUnusable
from shoal_controller.kube import gate

log = logging.getLogger(__name__)

PATH = "/gate"
#: A pod is at most 1.5 MiB at the API server; a review holds it once more as it was.
MAX_BODY = 8 << 20
#: Certificates are renewed long before they end.
RELOAD_S = 60.0


def review(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to an AdmissionReview. Pure.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        asked, version = request["request"], request["apiVersion"]
        uid, pod = asked["uid"], asked["object"]
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"this is no AdmissionReview with an object: {error!r} is missing") from error
    answer: dict[str, Any] = {"uid": uid, "allowed": True}
    try:
        patch = gate.admission_patch(pod)
    except InvalidRequest as error:
        answer |= {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": f"{gate.KEY}: {error}"}}
    else:
        if patch:
            encoded = base64.b64encode(json.dumps(patch).encode()).decode()
            answer |= {"patchType": "JSONPatch", "patch": encoded}
    return {"apiVersion": version, "kind": "AdmissionReview", "response": answer}


async def _handle(request: web.Request) -> web.Response:
    try:
        return web.json_response(review(await request.json()))
    except (InvalidRequest, ValueError) as error:
        return web.Response(status=400, text=f"{error}\n")


@asynccontextmanager
async def served(host: str, port: int, certificates: Path) -> AsyncIterator[int]:
    """Serve while the context is entered; it is the port. Files `tls.crt` and `tls.key` are read again as they change.

    Raises:
        StoreUnusable: the certificate cannot be read, or the address not listened on.
    """
    try:
        certificate = await asyncio.to_thread(_Certificate, certificates)
    except OSError as error:
        raise StoreUnusable(
            f"the gate's certificate in {certificates} cannot be used ({error}): it needs tls.crt and tls.key; name "
            "another directory with --gate-cert-dir"
        ) from error
    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_post(PATH, _handle)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    renewing = asyncio.create_task(certificate.renew())
    try:
        site = web.TCPSite(runner, host, port, ssl_context=certificate.listening)
        try:
            await site.start()
        except OSError as error:
            raise StoreUnusable(
                f"cannot listen on {host}:{port} ({error.strerror or error}): name another address with --gate-listen"
            ) from error
        yield int(runner.addresses[0][1])
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        await runner.cleanup()


class _Certificate:
    """A certificate in a directory, renewed there by others.

    A renewed one is another context, which handshakes take from then on: loaded into the one that is used, its
    certificate would for a moment have the key of the old one.

    Attributes:
        listening: what a socket is to listen with.
    """

    def __init__(self, directory: Path) -> None:
        """Blocks. Raises OSError where the certificate cannot be read or has not that key."""
        self._directory = directory
        self._content = self._read()
        self._current = self.listening = self._load()
        self.listening.sni_callback = self._choose

    async def renew(self) -> None:
        """Look for another one for ever."""
        while True:
            await asyncio.sleep(RELOAD_S)
            try:
                # Compared by content: a mounted Secret changes by renaming a link, which no time of a file tells.
                content = await asyncio.to_thread(self._read)
                if content != self._content:
                    self._current = await asyncio.to_thread(self._load)
                    self._content = content
                    log.info("the gate's certificate was renewed")
            except OSError as error:
                log.warning("the gate's certificate cannot be read again: %s", error)

    def _read(self) -> tuple[bytes, bytes]:
        return (self._directory / "tls.crt").read_bytes(), (self._directory / "tls.key").read_bytes()

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._directory / "tls.crt", self._directory / "tls.key")
        return context

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current
