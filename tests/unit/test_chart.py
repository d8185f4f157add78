"""charts/shoal: rendered over a matrix of values, and compared with the API's schemas, the programs and the docs."""

from __future__ import annotations

import base64
import importlib
import json
import re
import ssl
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from charts import values as values_file
from shoal import sizes
from shoal.version import VERSION
from shoal_cachenode.__main__ import main as cachenode
from shoal_cachenode.__main__ import parse_topology
from shoal_controller.__main__ import main as controller
from shoal_csi import mounts
from shoal_csi.__main__ import main as csi
from tests.support import helm, kube_schemas, metrics
from tests.support.helm import Manifest, Refused

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((helm.CHART / "templates").rglob("*.*"))

#: The oldest and the newest API that the chart is checked against.
APIS = "1.30", "1.37"
#: Not Kubernetes' own, so without a schema here.
FOREIGN = {"monitoring.coreos.com/v1", "cert-manager.io/v1"}

MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "least": {
        "csi": {"enabled": False},
        "gate": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "priorityClasses": {"create": False},
        "controller": {"replicas": 1},
    },
    "readers only": {"cacheNode": {"enabled": False}, "csi": {"controller": {"enabled": False}}},
    "everything": {
        "fullnameOverride": "cache",
        "imagePullSecrets": [{"name": "pull"}],
        "image": {"repository": "registry.example/shoal", "digest": "sha256:" + "0" * 64},
        "listenHost": "::",
        "logLevel": "debug",
        "origins": {
            "readableSecrets": ["imagenet-s3", "laion-s3"],
            "env": [{"name": "AWS_REGION", "value": "eu-central-1"}],
            "volumes": [{"name": "nfs", "nfs": {"server": "nas", "path": "/data"}}],
            "volumeMounts": [{"name": "nfs", "mountPath": "/data", "readOnly": True}],
        },
        "cacheNode": {
            "hostNetwork": True,
            "topology": "rack=r7",
            "originRate": "2GiB",
            "storage": {"capacity": "1.5TiB"},
            "extraArgs": ["--max-connections=4096"],
            "podSecurityContext": {"seLinuxOptions": {"type": "spc_t"}},
            "serviceAccountAnnotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/shoal"},
        },
        "controller": {
            "replicas": 3,
            "allowAdhoc": ["s3://team"],
            "drainTaints": ["health.example/*"],
            "affinity": {"nodeAffinity": {}},
        },
        "gate": {"namespaces": ["team-a", "team-b"], "tls": {"from": "cert-manager"}},
        "csi": {"node": {"updateStrategy": "OnDelete", "fdstore": {"ownPod": False}}, "inlineVolumes": False},
        "storageClasses": [
            {"name": "imagenet", "dataset": "imagenet", "subpath": "train", "writers": "read-only"},
            {"name": "laion", "dataset": "laion", "snapshot": "newest", "mountOptions": ["noatime"]},
        ],
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
            "control": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
            "egress": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}}],
        },
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True, "annotations": {"folder": "Shoal"}},
        },
    },
    "local volumes": {
        "cacheNode": {"storage": {"type": "ephemeral", "storageClassName": "local", "size": "3Ti"}},
        "gate": {"admissionPolicy": False, "tls": {"from": "existing", "secretName": "tls", "caBundle": "Q0E="}},
        "csi": {"node": {"fdstore": {"enabled": False}, "maxUnavailable": 3}, "metricsPort": 0},
        "logFormat": "text",
        "metrics": {"serviceMonitor": {"enabled": True}},
    },
    "trying out": {
        "cacheNode": {"storage": {"type": "emptyDir", "size": "10Gi"}, "nodeSelector": {"shoal.io/cache": None}},
        "gate": {"tls": {"from": "cert-manager", "issuerRef": {"kind": "ClusterIssuer", "name": "ca"}}},
    },
}
over_the_matrix = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)


@over_the_matrix
def test_lint_finds_nothing(values: dict[str, Any]) -> None:
    assert helm.lint(values) == []


@over_the_matrix
def test_every_object_is_what_the_api_takes(values: dict[str, Any]) -> None:
    objects = helm.manifests(values)
    keys = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects]
    assert len(set(keys)) == len(keys), "two objects of one name"
    for each in objects:
        if each["apiVersion"] not in FOREIGN:
            for api in APIS:
                assert kube_schemas.faults(each, api) == [], each["metadata"]["name"]
        if each["kind"] not in _cluster_wide():
            assert each["metadata"]["namespace"], each["metadata"]["name"]
        name = each["metadata"]["name"]
        assert len(name) <= 63 and re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name)


def _cluster_wide() -> set[str]:
    return {
        "ClusterRole",
        "ClusterRoleBinding",
        "CSIDriver",
        "MutatingWebhookConfiguration",
        "PriorityClass",
        "StorageClass",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    }


@over_the_matrix
def test_what_names_pods_finds_them(values: dict[str, Any]) -> None:
    """Selectors, ports by name, service accounts, secrets, priority classes and volumes, which no schema compares."""
    objects = helm.manifests(values)
    pods = dict(helm.pods(objects))
    for each in objects:
        spec = each.get("spec") or {}
        match each["kind"]:
            case "DaemonSet" | "Deployment":
                assert _matches(spec["selector"]["matchLabels"], spec["template"])
            case "Service" if "selector" in spec:
                (pod,) = [pod for pod in pods.values() if _matches(spec["selector"], pod)]
                for port in spec["ports"]:
                    assert port["targetPort"] in _port_names(pod)
            case "PodMonitor":
                (key,) = spec["selector"]["matchExpressions"]
                scraped = [pod for pod in pods.values() if pod["metadata"]["labels"][key["key"]] in key["values"]]
                assert scraped
                for pod in scraped:
                    assert _matches(spec["selector"]["matchLabels"], pod)
                    assert {port["port"] for port in spec["podMetricsEndpoints"]} <= _port_names(pod)
            case "NetworkPolicy":
                (pod,) = [pod for pod in pods.values() if _matches(spec["podSelector"]["matchLabels"], pod)]
                for rule in spec["ingress"]:
                    assert {port["port"] for port in rule.get("ports", [])} <= _port_names(pod)
            case "PodDisruptionBudget":
                assert [pod for pod in pods.values() if _matches(spec["selector"]["matchLabels"], pod)]
            case "RoleBinding" | "ClusterRoleBinding":
                helm.named(objects, each["roleRef"]["kind"], each["roleRef"]["name"]) if each[
                    "kind"
                ] != "RoleBinding" else None
                for subject in each["subjects"]:
                    helm.named(objects, "ServiceAccount", subject["name"])
    for pod in pods.values():
        spec = pod["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in helm.containers(pod):
            mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
            assert set(mounts) <= volumes
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                assert port is None or port in _port_names(pod) | _port_numbers(pod)
        if "serviceAccountName" in spec:
            helm.named(objects, "ServiceAccount", spec["serviceAccountName"])
        priority = spec.get("priorityClassName", "system-node-critical")
        assert priority.startswith("system-") or helm.named(objects, "PriorityClass", priority)


def _is_role_of(binding: Manifest, role: Manifest) -> bool:
    names = role["metadata"]["name"] == binding["roleRef"]["name"]
    return names and role["metadata"].get("namespace") == binding["metadata"].get("namespace")


def _matches(selector: dict[str, str], pod: Manifest) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


def _port_names(pod: Manifest) -> set[Any]:
    return {port.get("name") for container in helm.containers(pod) for port in container.get("ports", [])}


def _port_numbers(pod: Manifest) -> set[Any]:
    return {port["containerPort"] for container in helm.containers(pod) for port in container.get("ports", [])}


@over_the_matrix
def test_nothing_is_privileged_but_what_mounts(values: dict[str, Any]) -> None:
    privileged, roots, added = set(), set(), {}
    for component, pod in helm.pods(helm.manifests(values)):
        above = pod["spec"]["securityContext"]
        assert above["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(pod["spec"].get(name) for name in ("hostPID", "hostIPC"))
        for container in helm.containers(pod):
            where = component, container["name"]
            context = {**above, **container["securityContext"]}
            assert context["readOnlyRootFilesystem"], where
            if context["runAsUser"] == 0:
                roots.add(where)
            else:
                assert context["runAsNonRoot"], where
            if context.get("privileged"):
                privileged.add(where)
                continue
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"]["drop"] == ["ALL"], where
            if "add" in context["capabilities"]:
                added[where] = context["capabilities"]["add"]
    assert privileged <= {("csi-node", "driver")}
    assert added.items() <= {("cachenode", "prepare"): ["CHOWN"]}.items()
    assert roots <= {
        *privileged,
        ("cachenode", "prepare"),
        ("csi-node", "registrar"),
        ("csi-node", "liveness-probe"),
        ("csi-node", "fdstore"),
        ("fdstore", "fdstore"),
    }


@over_the_matrix
def test_hosts_and_tokens_are_for_few(values: dict[str, Any]) -> None:
    """Folders of the host, and tokens of the API server, by pod."""
    objects = helm.manifests(values)
    for component, pod in helm.pods(objects):
        spec = pod["spec"]
        folders = {each["hostPath"]["path"] for each in spec.get("volumes", []) if "hostPath" in each}
        allowed = {
            "cachenode": {"/var/lib/shoal/cachenode", "/run/shoal"},
            "csi-node": {
                "/var/lib/kubelet",
                "/var/lib/kubelet/plugins/csi.shoal.io",
                "/var/lib/kubelet/plugins_registry",
                "/run/shoal",
                "/run/shoal-mounts",
            },
            "fdstore": {"/run/shoal-mounts"},
        }
        assert folders <= allowed.get(component, set()), component
        has_token = spec["automountServiceAccountToken"]
        assert has_token == (component in ("controller", "csi-controller")), component
    # The driver's mounts must reach the host from one place; seen twice they would count as used.
    for component, pod in helm.pods(objects):
        for container in helm.containers(pod):
            propagated = [m for m in container.get("volumeMounts", []) if "mountPropagation" in m]
            assert bool(propagated) == ((component, container["name"]) == ("csi-node", "driver"))


#: What an account with these could become more with, or learn what is others'.
NEVER = {
    ("", "secrets", "list"),
    ("", "secrets", "watch"),
    ("", "secrets", "create"),
    ("", "serviceaccounts/token", "create"),
    ("", "pods", "create"),
    ("", "pods/exec", "create"),
    ("", "pods/ephemeralcontainers", "patch"),
    ("", "nodes", "patch"),
    ("", "nodes/proxy", "get"),
}


@over_the_matrix
def test_no_right_is_more_than_its_reason(values: dict[str, Any]) -> None:
    objects = helm.manifests(values)
    for role in [*helm.of_kind(objects, "ClusterRole"), *helm.of_kind(objects, "Role")]:
        for rule in role["rules"]:
            for group, resource, verb in _rights(rule):
                assert "*" not in (group, resource, verb)
                assert verb not in ("escalate", "bind", "impersonate", "deletecollection")
                assert not group.startswith(("rbac.", "admissionregistration.", "apiextensions."))
                assert (group, resource, verb) not in NEVER
                if resource == "secrets":
                    assert role["kind"] == "Role" and rule["resourceNames"]
    assert {binding["roleRef"]["kind"] for binding in helm.of_kind(objects, "RoleBinding")} <= {"Role"}


def _rights(rule: dict[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    for group in rule["apiGroups"]:
        for resource in rule["resources"]:
            for verb in rule["verbs"]:
                yield group, resource, verb


def test_each_verb_has_its_reason_beside_it() -> None:
    found = 0
    for path in TEMPLATES:
        reasons = ""
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("# "):
                reasons += line
            elif "verbs:" in line:
                verbs = re.findall(r"[a-z]+", line.partition("verbs:")[2])
                found += len(verbs)
                stated = {word for part in re.findall(r"([a-z, ]+):", reasons) for word in part.split(", ")}
                assert "The same, and delete" in reasons or {*verbs} <= {s.strip() for s in stated}, (path.name, line)
                reasons = ""
            elif "apiGroups:" in line:
                reasons = ""
    assert found > 20


def test_the_gate_is_asked_about_few_pods_and_stops_none() -> None:
    configuration = helm.named(helm.manifests({}), "MutatingWebhookConfiguration", "shoal-gate")
    (webhook,) = configuration["webhooks"]
    assert webhook["failurePolicy"] == "Ignore"
    assert webhook["objectSelector"] == {"matchExpressions": [{"key": "shoal.io/datasets", "operator": "Exists"}]}
    (rule,) = webhook["rules"]
    assert (rule["resources"], rule["operations"]) == (["pods"], ["CREATE"])
    (names,) = webhook["namespaceSelector"]["matchExpressions"]
    assert names["operator"] == "NotIn" and {"kube-system", helm.NAMESPACE} <= {*names["values"]}
    policy = helm.named(helm.manifests({}), "ValidatingAdmissionPolicy", "shoal-gate")["spec"]
    (condition,) = policy["matchConditions"]
    assert f"system:serviceaccount:{helm.NAMESPACE}:shoal-controller" in condition["expression"]
    helm.named(helm.manifests({}), "ServiceAccount", "shoal-controller")


def test_namespaces_bound_the_right_to_pods() -> None:
    objects = helm.manifests(MATRIX["everything"])
    everywhere = [
        right for role in helm.of_kind(objects, "ClusterRole") for rule in role["rules"] for right in _rights(rule)
    ]
    assert not [right for right in everywhere if right[1] == "pods"]
    assert {role["metadata"]["namespace"] for role in helm.of_kind(objects, "Role")} == {
        helm.NAMESPACE,
        "team-a",
        "team-b",
    }


def test_the_webhooks_certificate_is_one_that_the_api_server_accepts(tmp_path: Path) -> None:
    """A handshake with the certificate, against the bundle of the configuration, for the service's name."""
    objects = helm.manifests({})
    data = {key: base64.b64decode(value) for key, value in helm.named(objects, "Secret", "shoal-gate")["data"].items()}
    for name, text in data.items():
        (tmp_path / name).write_bytes(text)
    (webhook,) = helm.named(objects, "MutatingWebhookConfiguration", "shoal-gate")["webhooks"]
    reference = webhook["clientConfig"]["service"]
    helm.named(objects, "Service", reference["name"])
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client_side = ssl.create_default_context(cadata=base64.b64decode(webhook["clientConfig"]["caBundle"]).decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    host = f"{reference['name']}.{reference['namespace']}.svc"
    client = client_side.wrap_bio(to_client, to_server, server_hostname=host)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.version() == server.version() == "TLSv1.3"


PROGRAMS = {"shoal-cachenode": cachenode, "shoal-controller": controller, "shoal-csi": csi}


@over_the_matrix
def test_programs_know_their_flags(values: dict[str, Any]) -> None:
    objects = helm.manifests(values)
    seen = set()
    for _, pod in helm.pods(objects):
        for container in helm.containers(pod):
            words = container.get("args", [])
            if not words or words[0] not in PROGRAMS:
                continue
            seen.add(words[0])
            program = PROGRAMS[words[0]]
            known = {flag for option in program.params for flag in option.opts}
            assert {word.partition("=")[0] for word in words[1:]} <= known
            named = set(re.findall(r"\$\((\w+)\)", " ".join(words)))
            assert named <= {each["name"] for each in container.get("env", [])}
            # With what Kubernetes puts in, the program itself takes each value.
            given = [re.sub(r"\$\(\w+\)", "10.0.0.1", word) for word in words[1:]]
            program.make_context(words[0], given, resilient_parsing=False)
    assert "shoal-controller" in seen


@pytest.mark.parametrize(("size", "offered"), [("100Gi", 80 << 30), ("1.5Ti", 1_319_413_953_331), ("2000", 1600)])
def test_an_empty_dir_is_not_filled_up_to_its_bound(size: str, offered: int) -> None:
    """Else kubelet evicts the pod, and all that it cached is gone."""
    values = {"cacheNode": {"storage": {"type": "emptyDir", "size": size}}}
    pods = dict(helm.pods(helm.manifests(values)))
    (capacity,) = [a for a in pods["cachenode"]["spec"]["containers"][0]["args"] if a.startswith("--capacity=")]
    assert sizes.parse(capacity.removeprefix("--capacity=")) == offered


def test_modules_that_are_run_are_there() -> None:
    for _, pod in helm.pods(helm.manifests({})):
        for container in helm.containers(pod):
            words = container.get("args", [])
            if words[:2] == ["python", "-m"]:
                assert importlib.import_module(words[2]).main


def test_a_zone_that_is_not_known_is_no_label() -> None:
    """Kubernetes before 1.35 does not say it to pods, and the flag is then ``zone=``."""
    assert parse_topology("host=gpu-1,zone=") == {"host": "gpu-1"}
    assert parse_topology("host=gpu-1,zone=a,rack=r7") == {"host": "gpu-1", "zone": "a", "rack": "r7"}


def test_metrics_that_are_shown_exist() -> None:
    """Names and labels are those of the docs, which other tests compare with what the programs say."""
    known = metrics.labels(*metrics.PAGES)
    alerts = yaml.safe_load(_text("charts/shoal/files/alerts.yaml"))
    dashboard = json.loads(_text("charts/shoal/files/dashboard.json"))
    shown = {rule["alert"]: rule["expr"] for group in alerts["groups"] for rule in group["rules"]}
    shown |= {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    seen = set()
    for where, expression in shown.items():
        for name, _, matchers in re.findall(r"\b((?:shoal|process|python)_\w+)(\{([^}]*)\})?", expression):
            base = re.sub(r"_(bucket|count|sum)$", "", name)
            found = name if name in known else base
            assert found in known, f"{where}: no process has {name}"
            named = set(re.findall(r"(\w+)\s*[=!]", matchers))
            assert named <= known[found], f"{where}: {name} has no label {named - known[found]}"
            seen.add("_".join(found.split("_")[:2]))
    assert seen > {"shoal_controller", "shoal_node", "shoal_csi", "shoal_mount", "shoal_operator", "process_resident"}
    assert set(re.findall(r'state!~"([a-z|]+)"', shown["ShoalMountDown"])[0].split("|")) < set(mounts.STATES)


def _text(*paths: str) -> str:
    return "\n".join((ROOT / path).read_text() for path in paths)


def test_values_are_described_once() -> None:
    """`python charts/values.py` makes both anew."""
    known = values_file.read(values_file.VALUES.read_text())
    assert values_file.SCHEMA.read_text() == values_file.schema_text(known)
    assert values_file.PAGE.read_text() == values_file.page(values_file.PAGE.read_text(), known)


def test_values_of_an_older_chart_are_refused_with_the_name_of_what_is_new() -> None:
    """As `helm upgrade --reuse-values` has them: they were whole once, and lack what the chart has now."""
    older = yaml.safe_load(values_file.VALUES.read_text())
    jsonschema.validate(older, (schema := yaml.safe_load(values_file.SCHEMA.read_text())))
    del older["cacheNode"]["storage"]["path"]
    with pytest.raises(jsonschema.ValidationError, match="'path' is a required property"):
        jsonschema.validate(older, schema)


def test_each_value_is_used() -> None:
    templates = "\n".join(path.read_text() for path in TEMPLATES)
    for value in values_file.read(values_file.VALUES.read_text()):
        assert re.search(rf"\.{value.path[-1]}\b", templates), ".".join(value.path)


@pytest.mark.parametrize("text", ["a: 1\n", "# -- sentence\na: 1\n", "# -- [word] sentence\na: 1\n", "# --\na: 1\n"])
def test_a_value_without_a_description_is_found(text: str) -> None:
    with pytest.raises(values_file.Undescribed, match="a "):
        values_file.schema(values_file.read(text))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"cacheNodes": {}}, ["cacheNodes", "not allowed"]),
        ({"cacheNode": {"storage": {"typ": "hostPath"}}}, ["cacheNode", "storage", "typ", "not allowed"]),
        ({"cacheNode": {"storage": {"type": "nvme"}}}, ["cacheNode", "storage", "type", "hostPath"]),
        ({"cacheNode": {"storage": {"capacity": "much"}}}, ["capacity", "pattern"]),
        ({"cacheNode": {"fetches": 0}}, ["fetches", "minimum"]),
        ({"cacheNode": {"unreadShare": 2}}, ["unreadShare", "maximum"]),
        ({"controller": {"replicas": "2"}}, ["replicas", "integer"]),
        ({"image": {"digest": "latest"}}, ["digest", "pattern"]),
        ({"csi": {"images": {"registrar": "registrar"}}}, ["registrar", "pattern"]),
        ({"csi": {"node": {"maxUnavailable": "some"}}}, ["maxUnavailable", "pattern"]),
        ({"socketDirectory": "run"}, ["socketDirectory", "pattern"]),
        ({"storageClasses": [{"name": "a"}]}, ["storageClasses", "dataset"]),
        ({"gate": {"tls": {"from": "existing"}}}, ["gate.tls.secretName"]),
        ({"cacheNode": {"hostNetwork": True}}, ["networkPolicy.control", "ipBlock"]),
        ({"gate": {"tls": {"from": "existing", "secretName": "a"}}}, ["gate.tls.caBundle"]),
    ],
    ids=lambda each: str(each)[:60] if isinstance(each, dict) else "",
)
def test_wrong_values_are_refused_with_their_name(wrong: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Refused) as refused:
        helm.manifests(wrong)
    for word in words:
        assert word in str(refused.value)


def test_notes_name_what_is_there() -> None:
    notes = helm.files({}, "training")[helm.NOTES]
    assert "kubectl label node NODE shoal.io/cache=true" in notes
    assert "http://training-shoal-controller.shoal.svc:7441" in notes
    assert "emptyDir" in helm.files(MATRIX["trying out"])[helm.NOTES]


def test_examples_of_the_page_are_what_the_api_takes() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", _text("docs/kubernetes.md"), re.MULTILINE | re.DOTALL)
    examples = [each for block in blocks for each in yaml.safe_load_all(block)]
    assert [each["kind"] for each in examples] == ["Dataset", "Prefetch", "Job"]
    for each in examples:
        if not each["apiVersion"].startswith("shoal.io/"):
            for api in APIS:
                assert kube_schemas.faults(each, api) == []
    definitions = {
        definition["spec"]["names"]["kind"]: definition
        for path in (helm.CHART / "crds").glob("*.yaml")
        for definition in yaml.safe_load_all(path.read_text())
    }
    for each in examples:
        if each["apiVersion"].startswith("shoal.io/"):
            assert kube_schemas.custom_faults(each, definitions[each["kind"]]) == []


def test_versions_are_one() -> None:
    chart = helm.chart().metadata
    project = tomllib.loads(_text("pyproject.toml"))["project"]
    assert chart["version"] == chart["appVersion"] == project["version"] == VERSION


def test_the_image_has_what_the_chart_takes_for_granted() -> None:
    image = _text("Containerfile")
    uid = re.search(r'define "shoal.uid" -}}(\d+)', _text("charts/shoal/templates/_helpers.tpl"))
    assert uid and f"USER {uid[1]}:{uid[1]}" in image
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in image
    copied = set(re.findall(r"^COPY (?!--)(.+) \S+$", image, re.MULTILINE))
    for words in copied:
        for name in words.split():
            assert (ROOT / name).exists(), name
