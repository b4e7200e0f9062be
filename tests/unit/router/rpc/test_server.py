"""Where the server listens and with what certificate; what cannot work is refused by the setting's name."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.router_server import RouterServer, router_config
from support.rpc import request

from ellm.router.config import GrpcConfig
from ellm.router.rpc import tls
from ellm.router.rpc.ellm_inference_pb2_grpc import InferenceStub
from ellm.router.rpc.server import Listen, RpcServer, check_listen
from ellm.worker.api.errors import ConfigError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> GrpcConfig:
    """A certificate for 127.0.0.1 that signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return GrpcConfig(str(folder / "cert.pem"), str(folder / "key.pem"))


def test_tls(pair: GrpcConfig) -> None:
    assert pair.tls_cert is not None
    with RouterServer(config=router_config(grpc=pair), grpc=True) as server:
        address = f"127.0.0.1:{server.rpc.port}"
        trusted = grpc.ssl_channel_credentials(Path(pair.tls_cert).read_bytes())
        with grpc.secure_channel(address, trusted) as channel:
            assert list(InferenceStub(channel).Generate(request(), timeout=60))
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(InferenceStub(channel).Generate(request(), timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_without_tls_there_is_none() -> None:
    assert tls.read_pair(GrpcConfig()) is None


@pytest.mark.parametrize("name", ["tls_cert", "tls_key"])
def test_half_a_pair_is_refused(pair: GrpcConfig, name: str) -> None:
    other = "tls_key" if name == "tls_cert" else "tls_cert"
    with pytest.raises(ConfigError, match=f"router.grpc.{name}: TLS needs"):
        tls.read_pair(GrpcConfig(**{other: getattr(pair, other)}))


def test_files_that_are_no_pair_are_refused(pair: GrpcConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.grpc\.tls_key: cannot read"):
        tls.read_pair(GrpcConfig(pair.tls_cert, str(tmp_path / "none.pem")))
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key\n")
    with pytest.raises(ConfigError, match=r"router\.grpc\.tls_cert: .* no certificate and its open key"):
        tls.read_pair(GrpcConfig(pair.tls_cert, str(wrong)))


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = Listen("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"cluster\.grpc_port: port {listen.port} is in use") as caught:
            check_listen(listen)
        assert caught.value.param == "cluster.grpc_port"


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.grpc_port: gRPC cannot listen on {host}:1"):
        check_listen(Listen(host, 1))


def test_routers_of_one_node_share_the_port() -> None:
    with RouterServer(grpc=True) as first:
        listen = Listen("127.0.0.1", first.rpc.port)
        check_listen(listen)

        async def second() -> int:
            server = RpcServer(first.models, first.rpc._guard, first.config, listen)
            await server.start()
            await server.stop(0.0)
            return server.port

        assert first.wait_for(second()) == first.rpc.port
        with grpc.insecure_channel(f"127.0.0.1:{first.rpc.port}") as channel:
            assert list(InferenceStub(channel).Generate(request(), timeout=60))
