"""The RayService: Serve gets a configuration that our own loader takes, the nodes hold what it asks for."""

from __future__ import annotations

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema
from support.chart import NAMESPACE, VALUES, Rendered, merged, render

from ellm.deploy import app, ray_cluster
from ellm.deploy.config import from_mapping
from ellm.deploy.resolve import resolve
from ellm.deploy.tree import EllmConfig, worker_deployment
from ellm.router.config import ROUTER_CPUS
from ellm.worker.api import json_log

CHOSEN_FREELY = "PORT"  # of several clusters on one machine; a pod is alone
H100 = VALUES["values-h100-tp2"]
MULTI = VALUES["values-multi-model"]


def config_of(rendered: Rendered) -> EllmConfig:
    (application,) = rendered.serve_config["applications"]
    return resolve(from_mapping(application["args"]))


def overrides(rendered: Rendered) -> dict[str, dict[str, Any]]:
    (application,) = rendered.serve_config["applications"]
    return {item["name"]: item for item in application["deployments"]}


def node_types(rendered: Rendered) -> dict[str, dict[str, Any]]:
    """What Ray's autoscaler makes of the groups."""
    cluster = rendered.ray_service["rayClusterConfig"]
    resource = {"metadata": {"name": "x", "namespace": NAMESPACE}, "spec": cluster}
    found: dict[str, dict[str, Any]] = _derive_autoscaling_config_from_ray_cr(resource)[
        "available_node_types"
    ]
    return found


@pytest.mark.parametrize("name", VALUES)
def test_serve_and_our_loader_take_the_configuration(name: str) -> None:
    rendered = render(VALUES[name])
    ServeDeploySchema.model_validate(rendered.serve_config)
    config = config_of(rendered)
    application = app.build_application(config)
    assert application is not None
    names = {worker_deployment(config, model) for model in config.served}
    assert set(overrides(rendered)) == {"Router", *names}
    (given,) = rendered.serve_config["applications"]
    module, function = given["import_path"].split(":")
    assert (module, getattr(app, function)) == (app.__name__, app.build)


@pytest.mark.parametrize("name", VALUES)
def test_a_bundle_holds_what_the_actors_in_it_ask_for(name: str) -> None:
    rendered = render(VALUES[name])
    config, deployments = config_of(rendered), overrides(rendered)
    assert deployments["Router"]["placement_group_bundles"][0]["CPU"] >= ROUTER_CPUS
    for model in config.served:
        bundles = deployments[worker_deployment(config, model)]["placement_group_bundles"]
        assert len(bundles) == model.worker.tensor_parallel_size
        for bundle in bundles:
            assert bundle["CPU"] == config.cluster.worker_num_cpus
            assert bundle.get("GPU", 0) == app.rank_gpus(model)


@pytest.mark.parametrize("name", VALUES)
def test_the_nodes_of_a_model_s_groups_hold_its_workers_and_no_others(name: str) -> None:
    rendered = render(VALUES[name])
    config, types = config_of(rendered), node_types(rendered)
    for deployment, wanted in overrides(rendered).items():
        need: dict[str, float] = {}
        for bundle in wanted["placement_group_bundles"]:
            for resource, amount in bundle.items():
                need[resource] = need.get(resource, 0) + amount
        fitting = {
            kind for kind, it in types.items() if all(it["resources"].get(k, 0) >= need[k] for k in need)
        }
        assert fitting, f"{deployment} fits nowhere"
        own = {
            kind for kind in types if set(need) & {key for key in types[kind]["resources"] if "ellm" in key}
        }
        assert fitting == own
    # As many pods as workers and routers need, and no pod of the head's for them.
    assert types["headgroup"]["resources"]["CPU"] == 0
    for model in config.served:
        (resource,) = (
            key for key in overrides(rendered)[worker_deployment(config, model)]["placement_group_bundles"][0]
            if key.startswith("ellm_")
        )  # fmt: skip
        pods = [
            (group, types[kind]) for kind, group in rendered.groups.items()
            if kind != "head" and resource in types[kind]["resources"]
        ]  # fmt: skip
        per_pod = [
            workers_in(kind["resources"], model.worker.tensor_parallel_size, config) for _, kind in pods
        ]
        assert (
            sum(n * group["replicas"] for n, (group, _) in zip(per_pod, pods, strict=True))
            >= model.num_workers
        )
        assert (
            sum(n * group["maxReplicas"] for n, (group, _) in zip(per_pod, pods, strict=True))
            >= model.max_workers
        )


def workers_in(resources: dict[str, float], ranks: int, config: EllmConfig) -> int:
    fits = resources["CPU"] // (ranks * config.cluster.worker_num_cpus)
    return int(min(fits, resources["GPU"] // ranks)) if resources.get("GPU") else int(fits)


def test_groups_are_one_per_model_and_kind_of_gpu() -> None:
    groups = render(MULTI).groups
    assert set(groups) == {"head", "routers", "qwen3-8b-h100", "qwen3-8b-a100", "qwen3-32b", "qwen3-0-6b"}
    product = "nvidia.com/gpu.product"
    selectors = {
        name: group["template"]["spec"]["nodeSelector"].get(product) for name, group in groups.items()
    }
    assert selectors["qwen3-8b-h100"] == selectors["qwen3-32b"] == "NVIDIA-H100-80GB-HBM3"
    assert selectors["qwen3-8b-a100"] == "NVIDIA-A100-SXM4-80GB"
    assert selectors["routers"] is selectors["qwen3-0-6b"] is None
    limits = {name: render(MULTI).container(name)["resources"]["limits"] for name in groups}
    assert limits["qwen3-32b"]["nvidia.com/gpu"] == 4
    assert "nvidia.com/gpu" not in limits["qwen3-0-6b"] | limits["routers"]
    assert (groups["qwen3-8b-a100"]["minReplicas"], groups["qwen3-8b-a100"]["maxReplicas"]) == (0, 4)


def test_several_workers_share_a_pod_with_their_gpus() -> None:
    group = render(H100).groups["llama-3-1-70b"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (
        1,
        1,
        4,
    )  # four workers in each
    assert group["rayStartParams"]["num-gpus"] == "8"
    assert group["rayStartParams"]["num-cpus"] == "32"
    args = render(H100).serve_config["applications"][0]["args"]
    assert (args["workers"], args["min_workers"], args["max_workers"], args["tp"]) == (4, 4, 16, 2)
    assert args["worker"]["cache"]["host_bytes"] == 137438953472


@pytest.mark.parametrize("name", VALUES)
def test_pods_have_the_environment_that_ellm_serve_sets(name: str) -> None:
    rendered = render(VALUES[name])
    wanted = {
        key: value for key, value in ray_cluster.environment(config_of(rendered), haproxy=True).items()
        if CHOSEN_FREELY not in key and key not in ("RAY_SERVE_HAPROXY_NBTHREAD", json_log.LEVEL)
    }  # fmt: skip
    for group in rendered.groups:
        found = {item["name"]: item.get("value") for item in rendered.container(group)["env"]}
        assert {key: found.get(key) for key in wanted} == wanted


def test_the_ingress_lives_as_long_as_the_longest_request() -> None:
    rendered = render(
        {"config": {"router": {"limits": {"request_deadline_s": 7200, "receive_timeout_s": 6.5}}}}
    )
    found = {item["name"]: item.get("value") for item in rendered.container("head")["env"]}
    assert found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "7205"
    assert found["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] == "leastconn\n    timeout http-request 7s"


def test_probes_tell_the_truth() -> None:
    rendered = render()
    worker, router, head = (rendered.container(group) for group in ("pydoc-5m", "routers", "head"))
    # Ready: a worker takes requests and makes steps. Alive: Ray is; who loads for an hour is not killed.
    assert worker["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "serve"}
    assert router["readinessProbe"]["grpc"] == {"port": 9000}
    for container in (worker, router):
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}
    assert head["livenessProbe"]["httpGet"]["path"] == "/api/healthz"
    for container in (worker, router, head):
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    for values in ({"grpc": {"enabled": False}}, {"grpc": {"tlsSecretName": "t"}}):
        assert render(values).container("routers")["readinessProbe"]["httpGet"]["path"] == "/health/ready"


@pytest.mark.parametrize("name", VALUES)
def test_pods_go_later_than_their_requests(name: str) -> None:
    rendered = render(VALUES[name])
    config = config_of(rendered)
    drain = max(config.router.drain_timeout_s, *(model.worker.drain_timeout_s for model in config.served))
    assert rendered.ray_service["rayClusterDeletionDelaySeconds"] > drain
    for group in rendered.groups:
        assert rendered.pod(group)["terminationGracePeriodSeconds"] > drain + 15  # Serve's margin
        if group != "head":
            *_, seconds = rendered.container(group)["lifecycle"]["preStop"]["exec"]["command"]
            assert drain < int(seconds) < rendered.pod(group)["terminationGracePeriodSeconds"]


def test_what_a_pod_runs_before_it_goes_is_a_command_of_ours() -> None:
    from ellm.deploy import cli

    program, *words = render().container("routers")["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "ellm"
    args = cli.parser(words[0]).parse_args(words)
    assert (args.node, args.timeout, args.worker) == ("here", 90.0, None)


def test_ray_wants_a_token_and_the_head_keeps_its_state() -> None:
    cluster = render().ray_service["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    reference = {"name": "llm-ellm-redis", "key": "password"}
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "llm-ellm-redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": reference}},
    }
    cluster = render({"auth": {"rayToken": {"enabled": False}}, "gcsFaultTolerance": {"enabled": False}})
    assert cluster.ray_service["rayClusterConfig"]["authOptions"] == {"mode": "disabled"}
    assert "gcsFaultToleranceOptions" not in cluster.ray_service["rayClusterConfig"]
    external = render(MULTI).ray_service["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert external["redisAddress"] == "redis.databases.svc:6379"


def test_keys_come_from_secrets_alone() -> None:
    rendered = render(H100)
    assert rendered.resources("Secret") == []
    assert config_of(rendered).router.admin_key is None
    for group in rendered.groups:
        env = {item["name"]: item for item in rendered.container(group)["env"]}
        reference = env["ELLM_ROUTER__ADMIN_KEY"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "ellm-admin", "key": "admin-key"}
        assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
        mounts = {mount["name"]: mount["mountPath"] for mount in rendered.container(group)["volumeMounts"]}
        folder, _, file = (config_of(rendered).router.api_key_file or "").rpartition("/")
        assert (mounts["keys"], file) == (folder, "keys.json")
    tls = render({"grpc": {"tlsSecretName": "cert"}})
    assert config_of(tls).router.grpc.tls_cert == "/etc/ellm/tls/tls.crt"


@pytest.mark.parametrize("name", VALUES)
def test_nothing_runs_as_root_or_with_a_token_it_does_not_need(name: str) -> None:
    rendered = render(merged(VALUES[name], {"autoscaler": {"enabled": False}}))
    pods = [rendered.pod(group) for group in rendered.groups]
    pods += [item["spec"] for item in rendered.resources("Pod")]
    pods += [item["spec"]["template"]["spec"] for item in rendered.resources("StatefulSet")]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    if name != "values-cpu":
        assert render(VALUES[name]).pod("head")["automountServiceAccountToken"] is True  # the autoscaler's


def test_a_change_of_settings_alone_leaves_the_pods_as_they_are() -> None:
    """KubeRay makes a new cluster when the pods change; Serve rolls in place when only its config does."""
    before = render()
    after = render({"model": {"config": {"scheduler": {"max_num_seqs": 8}}}, "logLevel": "warning"})
    assert before.serve_config != after.serve_config
    assert before.ray_service["rayClusterConfig"] == after.ray_service["rayClusterConfig"]
    new_image = render({"image": {"tag": "0.2.0-cpu"}})
    assert before.serve_config == new_image.serve_config
    assert before.ray_service["rayClusterConfig"] != new_image.ray_service["rayClusterConfig"]


def test_the_image_is_for_the_device() -> None:
    assert render().container("head")["image"] == "ellm-on-ray:0.1.0-cpu"
    assert {render(MULTI).container(group)["image"] for group in render(MULTI).groups} == {
        "ellm-on-ray:0.1.0-cuda"
    }
