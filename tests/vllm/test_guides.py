"""The commands for several machines that docs/vllm.md shows, as vLLM's own command line reads them. No process is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from chiasm.integrations.vllm.ec_connector import ChiasmECConnector
from chiasm.integrations.vllm.health import role_of
from chiasm.launch.vllm import ONE_PROCESS
from chiasm.wire import Role
from tests.deploy.guides import commands_of


@pytest.mark.parametrize(
    ("heading", "roles", "backends"),
    [
        ("Two machines", [Role.ENCODER, Role.PD], [ONE_PROCESS] * 2),
        ("Three machines", [Role.ENCODER, Role.PREFILL, Role.DECODE], [ONE_PROCESS] * 3),
        ("Instances on several GPUs", [Role.ENCODER, Role.PD], [ONE_PROCESS, None]),
    ],
)
def test_vllm_takes_each_flag_and_becomes_the_role(
    heading: str, roles: list[Role], backends: list[str | None], tmp_path: Path
) -> None:
    command = ServeSubcommand()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    *instances, _ = commands_of(
        "vllm.md", "## Several machines", f"### {heading}", folder=tmp_path
    )  # the last is the proxy's
    found = []
    for one, backend in zip(instances, backends, strict=True):
        arguments = parser.parse_args(one.arguments)
        command.validate(arguments)
        assert ECConnectorFactory.get_connector_class(arguments.ec_transfer_config) is ChiasmECConnector
        assert arguments.distributed_executor_backend == backend
        config = SimpleNamespace(
            ec_transfer_config=arguments.ec_transfer_config, kv_transfer_config=arguments.kv_transfer_config
        )
        found.append(role_of(config))
    assert found == roles
