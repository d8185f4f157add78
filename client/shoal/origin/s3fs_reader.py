"""S3 through s3fs: for options that obstore cannot be told, and for keys that it refuses.

s3fs is used for its sessions and clients only. Its file-system view is not: that drops slashes, caches listings and
reads without a condition, where a snapshot wants keys as they are and exactly one version.

The rule is obstore's: a version is an ETag, and each read carries it as If-Match and compares the answer's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

import fsspec.asyn

from shoal.errors import InvalidRequest, OriginNotFound, ShoalError
from shoal.origin import base, failures, pieces, urls
from shoal.origin.base import Deadlines, ObjectInfo, Sink

if TYPE_CHECKING:
    from typing_extensions import Buffer


class S3fsOrigin:
    """An `Origin` over one S3 bucket, its listing one page after the other."""

    def __init__(
        self, url: urls.OriginUrl, *, endpoint: str, identity: str, service: str, filesystem: Any, deadlines: Deadlines
    ) -> None:
        """Connects to nothing yet. `filesystem` is an ``s3fs.S3FileSystem`` that nobody else uses."""
        self.url = str(url)
        self.endpoint = endpoint
        self.identity = identity
        self.key_prefix = url.path + "/" if url.path else ""
        self._bucket, self._key, self._service = url.authority, url.path, service
        self._filesystem = filesystem
        self._deadlines = deadlines

    def list(self) -> Iterator[list[ObjectInfo]]:
        """See `Origin.list`."""
        found = False
        request = {"Bucket": self._bucket, "Prefix": self.key_prefix, "MaxKeys": base.PAGE_ROWS}
        deadline_s = self._deadlines.contact_s
        while True:
            page = self._call(self.url, deadline_s, "list_objects_v2", **request)
            batch = [
                self._row(each["Key"][len(self.key_prefix) :], each["Size"], each)
                for each in page.get("Contents", [])
                if not each["Key"].endswith("/")
            ]
            if batch:
                found = True
                yield batch
            if not page.get("IsTruncated"):
                break
            request["ContinuationToken"] = page["NextContinuationToken"]
            deadline_s = self._deadlines.read_s
        if not found:
            yield [self._single_object()]

    def _row(self, path: str, size_bytes: int, answer: Any) -> ObjectInfo:
        return ObjectInfo(path, size_bytes, base.e_tag_version(answer.get("ETag"), urls.join(self.url, path)))

    def _single_object(self) -> ObjectInfo:
        if self._key:
            try:
                head = self._call(self.url, self._deadlines.read_s, "head_object", Bucket=self._bucket, Key=self._key)
                return self._row("", head["ContentLength"], head)
            except OriginNotFound:
                pass
        raise base.nothing_there(self.url, self._bucket if not self._key else "", self._service)

    def read(self, path: str, version: str, start: int, end: int) -> Buffer:
        """See `Origin.read`."""
        return pieces.collected(self, path, version, start, end)

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        """See `Origin.stream`. A body taken as it comes costs less than one that aiohttp puts together."""
        url, key = urls.join(self.url, path), base.key_path(self.key_prefix, path)
        base.check_range(url, start, end)
        if start < end:
            found = self._pieces(url, key, version, start, end)
            pieces.stream(found, start, end, sink, url=url, service=self._service)

    def _pieces(self, url: str, key: str, version: str, start: int, end: int) -> pieces.Pieces:
        loop = self._filesystem.loop
        body = self._body(url, key, version, start, end)
        try:
            while piece := fsspec.asyn.sync(loop, anext, body, b""):
                yield memoryview(piece)
        except ShoalError:
            raise
        except Exception as error:  # whatever s3fs, botocore and aiohttp raise is converted
            converted = self._converted(error, url)
            if isinstance(converted, OriginNotFound):
                converted = base.changed(url, "was removed")
            raise converted from error
        finally:
            fsspec.asyn.sync(loop, body.aclose)

    async def _body(self, url: str, key: str, version: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        answer = await self._filesystem._call_s3(
            "get_object",
            Bucket=self._bucket,
            Key=key,
            Range=f"bytes={start}-{end - 1}",
            IfMatch=base.if_match(version),
            **self._filesystem.req_kw,
        )
        async with answer["Body"] as body:
            if base.e_tag_version(answer.get("ETag"), url) != version:
                raise base.changed(url, "has changed")
            given = answer.get("ContentRange", "")
            span, _, total = given.rpartition("/")
            if total.isdigit() and int(total) < end:
                raise base.changed(url, "has become shorter")
            if span != f"bytes {start}-{end - 1}":
                raise base.unusable(
                    url, self._service, f"asked for bytes {start} to {end}, got {given or 'everything'!r}"
                )
            while piece := await _next_piece(body):
                yield piece

    def _call(self, url: str, deadline_s: float, method: str, **request: Any) -> dict[str, Any]:
        """One S3 call, with attempts until `deadline_s`."""

        def attempt() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = self._filesystem.call_s3(method, **request, **self._filesystem.req_kw)
                return answer
            except Exception as error:  # as above
                raise self._converted(error, url) from error

        return self._deadlines.attempts(deadline_s)(attempt)

    def _converted(self, error: Exception, url: str) -> ShoalError:
        return to_error(error, url=url, bucket=self._bucket, service=self._service)

    def close(self) -> None:
        """See `Origin.close`. s3fs closes its connections when its file system is collected."""
        del self._filesystem


async def _next_piece(body: Any) -> bytes:
    """What has come, once it is enough to be worth a change of threads; b"" at the end."""
    parts: list[bytes] = []
    size_bytes = 0
    while size_bytes < pieces.MIN_BYTES and (part := await body.read(pieces.STEP_BYTES)):
        parts.append(part)
        size_bytes += len(part)
    return b"".join(parts)


def to_error(error: Exception, *, url: str, bucket: str, service: str) -> ShoalError:
    """The error that an exception of s3fs, botocore or aiohttp is."""
    import botocore.exceptions

    causes = list(failures.causes(error))
    for each in causes:
        if isinstance(each, botocore.exceptions.ClientError):
            code = str(each.response.get("Error", {}).get("Code", ""))
            answer = each.response.get("ResponseMetadata", {})
            wait_s = failures.retry_after_s(answer.get("HTTPHeaders", {}).get("retry-after"), now_s=time.time())
            failure = failures.Failure(
                int(answer.get("HTTPStatusCode", 0)), "" if code.isdigit() else code, retry_after_s=wait_s
            )
            return failures.to_error(failure, url=url, bucket=bucket, service=service)
        if isinstance(each, botocore.exceptions.NoCredentialsError):
            return failures.to_error(
                failures.Failure(401, "no credentials found"), url=url, bucket=bucket, service=service
            )
        if isinstance(each, botocore.exceptions.ParamValidationError):
            return InvalidRequest(f"{url} is no S3 location: {' '.join(str(each).split())}")
    return failures.to_error(
        failures.Failure(reason=failures.words_for(causes)), url=url, bucket=bucket, service=service
    )
