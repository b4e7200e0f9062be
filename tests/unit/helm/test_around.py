"""What stands around the RayService: Redis, services, ingress, policies, budgets, volumes, tests, notes."""

from __future__ import annotations

import pytest
from support.chart import VALUES, render

H100, MULTI = VALUES["values-h100-tp2"], VALUES["values-multi-model"]
COMPONENT = "app.kubernetes.io/component"


def test_redis_keeps_what_it_was_told_and_asks_for_the_password() -> None:
    rendered = render()
    spec = rendered.one("StatefulSet")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (line,) = container["args"]
    assert "--requirepass" in line
    assert "--appendonly yes --appendfsync always" in line
    (env,) = container["env"]
    assert env["valueFrom"]["secretKeyRef"] == {"name": "llm-ellm-redis", "key": "password"}
    service = rendered.one("Service", "llm-ellm-redis")["spec"]
    assert service["selector"] == spec["selector"]["matchLabels"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert spec["volumeClaimTemplates"][0]["metadata"]["name"] == container["volumeMounts"][0]["name"]
    assert render(MULTI).resources("StatefulSet") == []  # it is somewhere else
    fleeting = render({"gcsFaultTolerance": {"redis": {"persistence": {"enabled": False}}}})
    assert "volumeClaimTemplates" not in fleeting.one("StatefulSet")["spec"]


def test_grpc_has_a_service_of_its_own_to_the_routers() -> None:
    rendered = render()
    spec = rendered.one("Service", "llm-ellm-grpc")["spec"]
    assert spec["selector"].items() <= rendered.groups["routers"]["template"]["metadata"]["labels"].items()
    assert spec["selector"][COMPONENT] == "router"
    assert spec["clusterIP"] == "None"
    (port,) = spec["ports"]
    ports = {item["name"]: item["containerPort"] for item in rendered.container("routers")["ports"]}
    assert ports[port["targetPort"]] == port["port"] == 9000
    assert port["appProtocol"] == "kubernetes.io/h2c"
    (application,) = rendered.serve_config["applications"]
    assert application["args"]["cluster"]["grpc_port"] == 9000
    assert "grpc" not in {item["name"] for item in rendered.container("head")["ports"]}
    without = render({"grpc": {"enabled": False}})
    assert "llm-ellm-grpc" not in {item["metadata"]["name"] for item in without.resources("Service")}
    assert "grpc_port" not in without.serve_config["applications"][0]["args"]["cluster"]
    balanced = render({"grpc": {"service": {"type": "LoadBalancer"}}}).one("Service", "llm-ellm-grpc")["spec"]
    assert "clusterIP" not in balanced


def test_the_ingress_leads_to_kuberay_s_service() -> None:
    assert render().resources("Ingress") == []
    spec = render(H100).one("Ingress")["spec"]
    (rule,) = spec["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "llm-ellm-serve-svc", "port": {"number": 8000}}
    assert spec["tls"] == [{"hosts": ["llm.example.org"], "secretName": "llm-example-org"}]
    assert "host" not in render({"ingress": {"enabled": True}}).one("Ingress")["spec"]["rules"][0]


def test_only_the_edges_are_open() -> None:
    rendered = render()
    policy = rendered.one("NetworkPolicy", "llm-ellm")["spec"]
    among, everybody, *others = policy["ingress"]
    assert "ports" not in among
    assert among["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "llm"
    assert [port["port"] for port in everybody["ports"]] == [8000, 9000]
    assert "from" not in everybody
    # Beside clients, nobody is let in by namespace alone.
    assert all(rule["from"] and all("podSelector" in peer for peer in rule["from"]) for rule in others)
    open_ports = {port["port"] for rule in others for port in rule["ports"]}
    assert open_ports == {8000, 8080, 8265}
    redis = rendered.one("NetworkPolicy", "llm-ellm-redis")["spec"]
    assert redis["egress"] == []
    assert redis["podSelector"]["matchLabels"][COMPONENT] == "redis"
    clients = [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]
    closed = render({"networkPolicy": {"clients": clients}}).one("NetworkPolicy", "llm-ellm")["spec"]
    assert closed["ingress"][1]["from"] == clients
    assert render({"networkPolicy": {"enabled": False}}).resources("NetworkPolicy") == []


@pytest.mark.parametrize("name", VALUES)
def test_the_policy_and_the_budgets_select_the_pods_they_mean(name: str) -> None:
    rendered = render(VALUES[name])
    labels = {group: item["template"]["metadata"]["labels"] for group, item in rendered.groups.items()}
    for budget in rendered.resources("PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        held = [group for group, found in labels.items() if wanted <= found.items()]
        pods = sum(rendered.groups[group]["minReplicas"] for group in held)
        assert held
        assert "head" not in held
        assert budget["spec"]["minAvailable"] == pods - 1  # one may go at a time
    assert len(rendered.resources("PodDisruptionBudget")) in (
        0,
        1 + len(rendered.serve_config["applications"][0]["deployments"]) - 1,
    )


def test_models_are_kept_where_the_values_say() -> None:
    def volume(values: dict[str, object]) -> object:
        (found,) = (item for item in render(values).pod("routers")["volumes"] if item["name"] == "models")
        return {key: value for key, value in found.items() if key != "name"}

    claim = render().one("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert volume({}) == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    existing: dict[str, object] = {"persistence": {"existingClaim": "mine"}}
    assert volume(existing) == {"persistentVolumeClaim": {"claimName": "mine"}}
    assert volume({"persistence": {"enabled": False}}) == {"emptyDir": {}}
    assert volume(H100) == {"hostPath": {"path": "/var/lib/ellm/models", "type": "DirectoryOrCreate"}}
    for values in (existing, {"persistence": {"enabled": False}}, H100):
        assert render(values).resources("PersistentVolumeClaim") == []
    env = {item["name"]: item.get("value") for item in render().container("head")["env"]}
    mounts = {item["name"]: item["mountPath"] for item in render().container("head")["volumeMounts"]}
    assert env["HF_HOME"] == mounts["models"]
    offline = render({"persistence": {"offline": True}}).container("head")["env"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in offline


def test_the_service_account_is_the_pods() -> None:
    rendered = render({"serviceAccount": {"annotations": {"a": "b"}}})
    account = rendered.one("ServiceAccount")
    assert account["metadata"]["annotations"] == {"a": "b"}
    assert {rendered.pod(group)["serviceAccountName"] for group in rendered.groups} == {
        account["metadata"]["name"]
    }
    other = render({"serviceAccount": {"create": False, "name": "theirs"}})
    assert other.resources("ServiceAccount") == []
    assert other.pod("head")["serviceAccountName"] == "theirs"


def test_pods_take_what_is_given_for_all_of_them() -> None:
    rendered = render(
        {
            "podLabels": {"a": "1"},
            "podAnnotations": {"b": "2"},
            "priorityClassName": "high",
            "extraEnv": [{"name": "C", "value": "3"}],
            "imagePullSecrets": [{"name": "d"}],
            "shmSize": "5Gi",
            "extraObjects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}}
            ],
        }
    )
    for group, item in rendered.groups.items():
        assert item["template"]["metadata"]["labels"]["a"] == "1"
        assert item["template"]["metadata"]["annotations"] == {"b": "2"}
        assert item["template"]["spec"]["priorityClassName"] == "high"
        assert {"name": "C", "value": "3"} in rendered.container(group)["env"]
        assert item["template"]["spec"]["imagePullSecrets"] == [{"name": "d"}]
    (shm,) = (item for item in rendered.pod("pydoc-5m")["volumes"] if item["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "5Gi"}
    assert rendered.one("ConfigMap")["metadata"]["name"] == "llm-x"


@pytest.mark.parametrize("name", VALUES)
def test_helm_s_tests_are_python_that_compiles(name: str) -> None:
    pods = render(VALUES[name]).resources("Pod")
    assert {pod["metadata"]["name"] for pod in pods} == {"llm-ellm-test-http", "llm-ellm-test-grpc"}
    for pod in pods:
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        (container,) = pod["spec"]["containers"]
        compile(container["args"][0], pod["metadata"]["name"], "exec")
    assert len(render({"grpc": {"tlsSecretName": "t"}}).resources("Pod")) == 1


def test_the_notes_say_what_is_served_and_what_is_missing() -> None:
    notes = render().texts["ellm/templates/NOTES.txt"]
    for text in (
        "pydoc-5m: 1 worker(s)",
        "create secret generic llm-ellm-redis",
        "open to everybody",
        "helm -n serving test llm",
    ):
        assert text in notes
    guarded = render(H100).texts["ellm/templates/NOTES.txt"]
    assert "open to everybody" not in guarded
    assert "--api-key" in guarded
