"""Objects compared with the schemas of Kubernetes' own API, as its releases publish them.

`kubernetes_validate` has the schemas, and reads 1.7 MB of them for each object; here they are read once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

pytest.importorskip(
    "kubernetes_validate", reason="the API's schemas are not installed: pip install kubernetes-validate"
)

_SHARED = "_definitions.json"


def faults(found: Mapping[str, Any], api: str) -> list[str]:
    """What API version `api` (such as 1.30) would not take of an object, unknown fields included."""
    return list(_faults(json.dumps(found, sort_keys=True), api))


def custom_faults(found: Mapping[str, Any], definition: Mapping[str, Any]) -> list[str]:
    """What the schema of a CustomResourceDefinition would not take, but for its CEL rules; unknown fields included."""
    _, _, version = found["apiVersion"].rpartition("/")
    (served,) = [each for each in definition["spec"]["versions"] if each["name"] == version]
    # The API server puts what it does not know away; `kubectl apply` refuses it, and so does this.
    schema = _closed(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(found)]


def _closed(schema: Any) -> Any:
    match schema:
        case {"properties": _}:
            return {"additionalProperties": False, **{key: _closed(value) for key, value in schema.items()}}
        case dict():
            return {key: _closed(value) for key, value in schema.items()}
        case list():
            return [_closed(each) for each in schema]
    return schema


@functools.cache
def _faults(text: str, api: str) -> tuple[str, ...]:
    found = json.loads(text)
    # As the files are named: rbac.authorization.k8s.io/v1 is rbac-v1.
    version = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", found["apiVersion"])
    checked = _validator(f"{found['kind'].lower()}-{version}.json", api)
    return tuple(f"{error.json_path}: {error.message}" for error in checked.iter_errors(found))


@functools.cache
def _validator(file: str, api: str) -> Draft202012Validator:
    return Draft202012Validator(_read(file, api).contents, registry=_read(file, api) @ _registry(api))


@functools.cache
def _registry(api: str) -> Any:
    return _read(_SHARED, api) @ Registry()


@functools.cache
def _read(file: str, api: str) -> Any:
    folder = resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{api}.0-local-strict"
    return Resource.from_contents(json.loads((folder / file).read_text()))
