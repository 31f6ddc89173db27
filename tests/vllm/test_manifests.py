"""What the kustomizations start, as vLLM's own command line and configurations read it. No process is started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from chiasm.integrations.vllm.ec_connector import ChiasmECConnector
from chiasm.integrations.vllm.health import role_of
from chiasm.wire import Role

from .processes import ROOT

_OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
_FILES = [
    path
    for overlay in ("vllm", "vllm-prefill-decode")
    for path in sorted((_OVERLAYS / overlay).glob("*.yaml"))
    if path.stem in set(Role)
]


def _container(path: Path) -> dict[str, Any]:
    (deployment,) = [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "Deployment"]
    container: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize("path", _FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_vllm_takes_each_flag_and_becomes_the_role(path: Path) -> None:
    container = _container(path)
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
    assert role_of(config) == Role(path.stem)


def test_a_flag_that_vllm_does_not_have_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "model", "--skip-mm-profilings", json.dumps({})])
    assert "unrecognized arguments" in capsys.readouterr().err
