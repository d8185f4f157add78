"""The webhook: over TLS as the API server speaks to it."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from cryptography import x509

from shoal.errors import InvalidRequest, StoreUnusable
from shoal.wire.process_metrics import Exposition
from shoal_controller.kube import gate, webhook
from shoal_controller.kube.metrics import OperatorMetrics
from tests.support import metrics


def admission_review(pod: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {"uid": "r1", "operation": "CREATE", "object": pod},
    }


def pod(text: str | None) -> dict[str, Any]:
    labels = {} if text is None else {gate.KEY: text}
    return {"metadata": {"generateName": "train-", "labels": labels}, "spec": {"containers": []}}


def test_a_labelled_pod_is_patched() -> None:
    answer = webhook.review(admission_review(pod("imagenet")))
    assert (answer["apiVersion"], answer["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response = answer["response"]
    assert (response["uid"], response["allowed"], response["patchType"]) == ("r1", True, "JSONPatch")
    patch = json.loads(base64.b64decode(response["patch"]))
    assert patch == [{"op": "add", "path": "/spec/schedulingGates", "value": [{"name": gate.GATE}]}]


def test_an_unlabelled_pod_is_let_through_as_it_is() -> None:
    assert webhook.review(admission_review(pod(None)))["response"] == {"uid": "r1", "allowed": True}


def test_what_cannot_be_understood_is_refused_with_what_to_write() -> None:
    response = webhook.review(admission_review(pod("image_net_")))["response"]
    assert response["allowed"] is False
    assert "shoal.io/datasets: 'image_net_' is no dataset name" in response["status"]["message"]


@pytest.mark.parametrize("wrong", [{}, {"apiVersion": "v1", "request": {"uid": "x"}}, {"request": None}])
def test_what_is_no_review(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no AdmissionReview"):
        webhook.review(wrong)


def certificates(directory: Path, authority: trustme.CA) -> None:
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    directory.mkdir(exist_ok=True)
    certificate.private_key_pem.write_to_path(directory / "tls.key")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    (directory / "tls.crt").write_bytes(chain)


def served(
    directory: Path,
    test: Callable[[str], Awaitable[None]],
    host: str = "localhost",
    told: OperatorMetrics | None = None,
) -> None:
    async def whole() -> None:
        serving = webhook.served("127.0.0.1", 0, directory, told or OperatorMetrics())
        async with asyncio.timeout(20), serving as port:
            await test(f"https://{host}:{port}")

    asyncio.run(whole())


async def ask(url: str, authority: trustme.CA, body: bytes) -> tuple[int, Any]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with aiohttp.ClientSession() as session, session.post(f"{url}/gate", data=body, ssl=context) as response:
        content = await response.text()
        return response.status, json.loads(content) if response.status == 200 else content


def test_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificates(tmp_path, authority)

    async def test(url: str) -> None:
        status, answer = await ask(url, authority, json.dumps(admission_review(pod("imagenet"))).encode())
        assert (status, answer["response"]["allowed"]) == (200, True)
        for wrong in (b"no json", b"{}", b"[]"):
            assert (await ask(url, authority, wrong))[0] == 400
        for text in (None, "[>=300%]"):
            assert (await ask(url, authority, json.dumps(admission_review(pod(text))).encode()))[0] == 200

    told = OperatorMetrics()
    served(tmp_path, test, told=told)
    found = metrics.samples(Exposition("p", told).text().decode())
    results = {key[1]: count for key, count in found.items() if key[0] == "shoal_operator_webhook_requests_total"}
    assert results == {"gated": 1, "not_understood": 3, "let_through": 1, "refused": 1}
    ends = found["shoal_operator_webhook_certificate_end_timestamp_seconds",]
    pem = (tmp_path / "tls.crt").read_bytes()
    assert ends == x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    assert found["shoal_operator_webhook_seconds_count",] == 6


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])  # with an address a client says no name
def test_a_renewed_certificate_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(webhook, "RELOAD_S", 0.02)
    before, after = trustme.CA(), trustme.CA()
    certificates(tmp_path, before)

    async def test(url: str) -> None:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(url, after, b"{}")
        certificates(tmp_path, after)
        while True:
            try:
                status, _ = await ask(url, after, b"{}")
            except aiohttp.ClientConnectorCertificateError:
                await asyncio.sleep(0.02)
            else:
                assert status == 400
                return

    served(tmp_path, test, host)


def test_a_missing_certificate_is_said(tmp_path: Path) -> None:
    async def nothing(url: str) -> None:
        raise AssertionError("it serves without a certificate")

    with pytest.raises(StoreUnusable, match=r"needs tls.crt and tls.key"):
        served(tmp_path / "none", nothing)
