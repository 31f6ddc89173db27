"""What the kustomizations start, as vLLM's own command line and configurations read it. No process is started."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics import loggers

from chiasm.integrations.vllm.ec_connector import ChiasmECConnector
from chiasm.integrations.vllm.health import role_of
from chiasm.wire import Role

from .processes import ROOT

_OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
_ROLES = {"vllm": (Role.ENCODER, Role.PD), "vllm-prefill-decode": (Role.ENCODER, Role.PREFILL, Role.DECODE)}


def test_vllm_has_the_metrics_that_dashboard_and_alerts_ask_for() -> None:
    texts = [(ROOT / "deploy" / "grafana" / name).read_text() for name in ("dashboard.json", "alerts.yaml")]
    named = set(re.findall(r"vllm:\w+", "".join(texts)))
    source = Path(loggers.__file__).read_text()
    assert named
    assert {name for name in named if f'name="{name.removesuffix("_bucket")}"' not in source} == set()


def _container(overlay: str, role: Role) -> dict[str, Any]:
    path = _OVERLAYS / overlay / f"{role}.yaml"
    (deployment,) = [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "Deployment"]
    container: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize(("overlay", "role"), [(overlay, role) for overlay, roles in _ROLES.items() for role in roles])
def test_vllm_takes_each_flag_and_becomes_the_role(overlay: str, role: Role) -> None:
    container = _container(overlay, role)
    assert container["command"] == ["vllm"]
    command = ServeSubcommand()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args([one.replace("$(POD_IP)", "127.0.0.1") for one in container["args"]])
    command.validate(arguments)
    assert arguments.model_tag == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (arguments.host, arguments.port) == ("0.0.0.0", 8000)
    assert ECConnectorFactory.get_connector_class(arguments.ec_transfer_config) is ChiasmECConnector
    config = SimpleNamespace(
        ec_transfer_config=arguments.ec_transfer_config, kv_transfer_config=arguments.kv_transfer_config
    )
    assert role_of(config) == role


def test_a_flag_that_vllm_does_not_have_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "model", "--no-such-flag"])
    assert "unrecognized arguments" in capsys.readouterr().err
