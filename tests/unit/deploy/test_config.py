"""The configuration: every source, their order, and what is said of a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ellm.deploy import config, dump, schema, tree
from ellm.deploy.cli import main
from ellm.worker.api.errors import ConfigError


def load(**kwargs: object) -> tree.EllmConfig:
    return config.load(**{"environ": {}, **kwargs}).config  # type: ignore[arg-type]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path, "cluster: {port: 1, num_workers: 1, host: a, log_level: debug}\n")
    environ = {"ELLM_CLUSTER__PORT": "2", "ELLM_CLUSTER__NUM_WORKERS": "2", "ELLM_CLUSTER__HOST": "b"}
    loaded = config.load(file, environ, ["cluster.port=3", "workers=3"], {"port": "4"})
    cluster = loaded.config.cluster
    assert (cluster.port, cluster.num_workers, cluster.host, cluster.log_level) == (4, 3, "b", "debug")
    assert loaded.origins["cluster.port"] == "command line"
    assert loaded.origins["cluster.num_workers"] == "--set"
    assert loaded.origins["cluster.host"] == "environment"
    assert loaded.origins["cluster.log_level"] == str(file)
    assert "cluster.grpc_port" not in loaded.origins


def test_on_and_off_are_switches_however_yaml_reads_them(tmp_path: Path) -> None:
    file = write(tmp_path, "worker: {fused_attention: on, recompute_ahead: 'off'}\n")
    worker = load(file=file).worker
    assert (worker.fused_attention, worker.recompute_ahead) == ("on", "off")
    assert load(settings=["worker.recompute_ahead=auto"]).worker.recompute_ahead == "auto"
    assert load(environ={"ELLM_WORKER__FUSED_ATTENTION": "off"}).worker.fused_attention == "off"
    printed = dump.dump(config.load(file, {}).config)
    assert load(file=write(tmp_path, printed)).worker == worker
    with pytest.raises(ConfigError, match="expected one of auto, on, off, got 'maybe'"):
        load(settings=["worker.fused_attention=maybe"])


def test_the_bundled_model_is_the_default() -> None:
    assert load().worker.model.path == str(config.BUNDLED_MODEL)


def test_variables_that_kubernetes_makes_are_not_settings() -> None:
    load(environ={"ELLM_PORT": "tcp://1.2.3.4:80", "ELLM_SERVICE_HOST": "1.2.3.4"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker: {cache: {num_block: 3}}", "worker.cache.num_block; did you mean worker.cache.num_blocks?"),
        ("worker: {num_blocks: 3}", "unknown key worker.num_blocks"),
        ("prot: 3", "unknown key prot"),
        ("cluster: {port: eight}", "cluster.port: expected an integer, got 'eight'"),
        ("cluster: {port: true}", "cluster.port: expected an integer, got True"),
        ("cluster: {port: 8.5}", "cluster.port: expected an integer, got 8.5"),
        ("cluster: {port: 70000}", "cluster.port: 70000 is not between 1 and 65535"),
        ("cluster: {haproxy: 1}", "cluster.haproxy: expected true or false, got 1"),
        ("cluster: {host: null}", "cluster.host: expected a string, got None"),
        ("worker: {model: {device: gpu}}", "expected one of auto, cpu, cuda, got 'gpu'"),
        ("worker: {model: {name: 7}}", "worker.model.name: expected a string or null, got 7"),
        ("router: {api_keys: secret}", "router.api_keys: expected a list, each item a string"),
        ("router: {api_keys: [1]}", "router.api_keys: expected a list"),
        ("worker: 3", "worker: expected keys and values, got 3"),
        ("[1, 2]", "expected keys and values"),
        ("port: 1\ncluster: {port: 1}", "port and cluster.port are the same setting"),
        ("cluster: {port: 1, port: 2}", "line 1: key port is given twice"),
        ("a: [", "is not YAML"),
        ("{port: 9, grpc_port: 9}", "same port"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r".") as caught:
        load(file=file)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"settings": ["worker.stal_s=1"]}, "--set: unknown key worker.stal_s; did you mean worker.stall_s?"),
        ({"settings": ["port"]}, "--set port: expected key=value"),
        ({"settings": ["port=x"]}, "--set: cluster.port: expected an integer, got 'x'"),
        ({"flags": {"dtype": "int8"}}, "command line: worker.model.dtype: expected one of auto, float32"),
        ({"environ": {"ELLM_CLUSTER__PORTS": "1"}}, "environment: unknown key cluster.ports; did you mean"),
        ({"file": "missing.yaml"}, "cannot read missing.yaml: No such file"),
        ({"settings": ["worker.cache.memory_fraction=nan"]}, "is not between"),
        ({"settings": ["tpot_slo_ms=0"]}, "worker.scheduler.tpot_slo_ms: 0.0 is not between"),
        ({"settings": ["ttft_slo_ms=inf"]}, "worker.scheduler.ttft_slo_ms: inf is not between"),
        ({"settings": ["router.limits.min_slo_ms=0"]}, "router.limits.min_slo_ms: 0.0 is not between"),
        ({"settings": ["router.limits.max_priority=-200"]}, "router.limits.min_priority is above"),
        ({"settings": ["router.pace_max_hold_s=-1"]}, "router.pace_max_hold_s: -1.0 is not between"),
    ],
)
def test_a_mistake_elsewhere_is_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**kwargs)
    assert message in caught.value.message


def test_text_becomes_what_the_field_wants() -> None:
    made = load(
        settings=[
            "served_model_name=123",
            "router.api_keys=[a, '1']",
            "worker.stall_s=1e1",
            "worker.heartbeat_s=1",
            "kv_blocks=null",
            "worker.model.jit=true",
        ]
    )
    assert made.worker.model.name == "123"
    assert made.router.api_keys == ("a", "1")
    assert made.worker.stall_s == 10.0
    assert isinstance(made.worker.heartbeat_s, float)
    assert made.worker.cache.num_blocks is None
    assert made.worker.model.jit is True


def test_every_alias_and_bound_names_a_leaf() -> None:
    assert set(tree.ALIASES.values()) <= set(tree.TYPES)
    assert set(tree.BOUNDS) <= set(tree.TYPES)
    leaves = schema.unbuild(tree.EllmConfig())
    for path, (low, high) in tree.BOUNDS.items():
        assert leaves[path] is None or low <= leaves[path] <= high


def test_every_annotation_of_the_tree_is_known() -> None:
    for path, value in schema.unbuild(tree.EllmConfig()).items():
        assert schema.coerce(tree.TYPES[path], value, path) == value
        assert schema.describe(tree.TYPES[path])


def test_what_is_printed_loads_again(tmp_path: Path) -> None:
    settings = ["model=a: b", "router.api_keys=['#x', '1']", "worker.scheduler.watermark=0.25", "threads=2"]
    loaded = config.load(environ={}, settings=settings)
    text = dump.dump(loaded.config, loaded.origins)
    assert load(file=write(tmp_path, text)) == loaded.config
    assert "watermark: 0.25  # --set" in text


@pytest.mark.parametrize(
    "settings",
    [
        ["controller.scaling.low_load=0.6"],
        ["controller.scaling.target_load=0.9"],
        ["controller.scaling.high_load=0.5"],
        ["controller.scaling.min_attainment=1.1"],
        ["controller.scaling.up_after_s=-1"],
        ["controller.scaling.down_after_s=.nan"],
        ["controller.scaling.cool_down_s=-1"],
        ["controller.plan_s=-0.1"],
        ["controller.held_back_s=0"],
        ["controller.router_gone_s=0.5"],
        ["model='simulated:'", "tp=2"],
    ],
)
def test_a_controller_that_cannot_work_is_refused(settings: list[str]) -> None:
    with pytest.raises(ConfigError):
        load(settings=settings)


def test_models_that_would_have_one_deployment_name_are_refused() -> None:
    entries = [{"model": "m", "served_model_name": name} for name in ("a/b", "a_b")]
    with pytest.raises(ConfigError, match="a/b and a_b"):
        config.from_mapping({"models": entries})


def test_a_config_that_is_shown_has_no_keys_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "router.api_keys=['sesame', 'open']", "--set", "router.admin_key=chief"]
    assert main(["serve", "simulated:", *settings, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert not any(secret in text for secret in ("sesame", "open'", "chief"))
    assert text.count("<redacted>") == 3
    with pytest.raises(ConfigError, match="no key"):
        load(file=write(tmp_path, text))
    assert main(["serve", "simulated:", "--print-config"]) == 0
    assert load(file=write(tmp_path, capsys.readouterr().out)).router.api_keys == ()


def test_serve_arguments_are_the_same_tree() -> None:
    tree = config.from_mapping({"workers": 3, "worker": {"cache": {"num_blocks": 7}}})
    assert tree == load(settings=["workers=3", "kv_blocks=7"])
    assert config.from_mapping(yaml.safe_load(dump.dump(tree))) == tree


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["port", "cache", "x"]), inner)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["worker", "router", "cluster", "port", "zzz"]), VALUES))
def test_any_data_gives_a_tree_or_a_config_error(data: dict[str, object]) -> None:
    try:
        tree = config.from_mapping(data)
    except ConfigError:
        return
    assert config.from_mapping(yaml.safe_load(dump.dump(tree))) == tree
