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
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509

from shoal.errors import InvalidRequest, StoreUnusable
from shoal_controller.kube import gate
from shoal_controller.kube.metrics import OperatorMetrics

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


def result_of(answer: Mapping[str, Any]) -> str:
    """One word for what `review` answered. Pure."""
    if not answer["response"]["allowed"]:
        return "refused"
    return "gated" if "patch" in answer["response"] else "let_through"


def _handler(metrics: OperatorMetrics) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        since, result = time.monotonic(), "failed"
        try:
            answer = review(await request.json())
            result = result_of(answer)
            return web.json_response(answer)
        except (InvalidRequest, ValueError) as error:
            result = "not_understood"
            return web.Response(status=400, text=f"{error}\n")
        finally:
            metrics.reviewed(result, time.monotonic() - since)

    return handle


@asynccontextmanager
async def served(host: str, port: int, certificates: Path, metrics: OperatorMetrics) -> AsyncIterator[int]:
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
    app.router.add_post(PATH, _handler(metrics))
    metrics.certificate_end = lambda: certificate.ends_utc_s
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
        ends_utc_s: when it is no longer valid, in seconds since the epoch.
    """

    def __init__(self, directory: Path) -> None:
        """Blocks. Raises OSError where the certificate cannot be read or has not that key."""
        self._directory = directory
        self._content = self._read()
        self._current = self.listening = self._load()
        self.ends_utc_s = _end(self._content[0])
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
                    self._content, self.ends_utc_s = content, _end(content[0])
                    log.info("the gate's certificate was renewed")
            except (OSError, ValueError) as error:
                log.warning("the gate's certificate cannot be read again: %s", error)

    def _read(self) -> tuple[bytes, bytes]:
        return (self._directory / "tls.crt").read_bytes(), (self._directory / "tls.key").read_bytes()

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._directory / "tls.crt", self._directory / "tls.key")
        return context

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current


def _end(certificate: bytes) -> float:
    """When a certificate ends (PEM, the first of a chain). Raises ValueError."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp()
