"""Options in a YAML file and in the environment, and what a dry run shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chiasm.cli import instance, proxy, serve
from chiasm.cli.dry_run import _without_secrets, preview
from chiasm.cli.parser import Parser
from chiasm.errors import ConfigurationError
from chiasm.launch import Deployment
from chiasm.proxy.tenants import TenantBy
from chiasm.wire import Role

COMMANDS = {"proxy": proxy.parser, "instance": instance.parser, "serve": serve.parser}


def parse(parser: Parser, tmp_path: Path, text: str, *arguments: str, **environment: str) -> dict[str, Any]:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return parser.parse([*arguments, "--config", str(path)], environment)


def test_the_command_line_counts_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = "port: 1\nmax-items: 2\nhost: a\n"
    found = parse(proxy.parser(), tmp_path, file, "--port", "3", CHIASM_PORT="4", CHIASM_MAX_ITEMS="5")
    assert found == {"port": 3, "max_items": 5, "host": "a"}


def test_a_file_has_values_as_the_command_line_reads_them(tmp_path: Path) -> None:
    file = """
pd: [http://a, http://b]
encoder: http://c
max_body_bytes: 5MiB
max-text-bytes: 4096
deadline_seconds: 1.5
tenant_by: authorization
allow_credentials: true
timing_comments: off
allowed_origins: ["https://x", "https://y"]
cpus: [0, 2-3]
api_key_file: keys
"""
    assert parse(proxy.parser(), tmp_path, file) == {
        "pd": ("http://a", "http://b"),
        "encoder": ("http://c",),
        "max_body_bytes": 5 << 20,
        "max_text_bytes": 4096,
        "deadline_seconds": 1.5,
        "tenant_by": TenantBy.AUTHORIZATION,
        "allow_credentials": True,
        "timing_comments": "off",
        "allowed_origins": ("https://x", "https://y"),
        "cpus": (0, 2, 3),
        "api_key_file": Path("keys"),
    }


def test_model_role_and_more_arguments_can_be_there_too(tmp_path: Path) -> None:
    assert parse(instance.parser(), tmp_path, "model: demo\nrole: pd") == {"model": "demo", "role": Role.PD}
    assert instance.parser().parse([], {"CHIASM_MODEL": "demo", "CHIASM_ROLE": "pd"}) == {
        "model": "demo",
        "role": Role.PD,
    }
    assert parse(serve.parser(), tmp_path, "model: demo\npd_args: [--block-size, 32]\nvllm_args: --seed 1") == {
        "model": "demo",
        "pd_args": ("--block-size", "32"),
        "vllm_args": ("--seed", "1"),
    }
    with pytest.raises(ConfigurationError, match="required: MODEL"):
        serve.parser().parse([], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_itmes: 3", "has no option 'max_itmes'; did you mean max_items?"),
        ("config: x", "has no option 'config'"),
        ("max-items: 1\nmax_items: 1", "max_items twice"),
        (
            "pd: http://a\nport: 1\npd: http://b",
            "'pd' is there twice, again at line 3, column 1; several values go into one list",
        ),
        ("allowed_origins: [{a: 1, a: 2}]", "'a' is there twice"),
        ("port: many", "port: 'many' is not an integer"),
        ("port:", "port: has no value"),
        ("allow_credentials: 1", "allow_credentials: must be true or false"),
        ("pd: [{a: b}]", "pd: must be one value"),
        ("max_body_bytes: lots", "'lots' is not a size"),
        ("[1, 2]", "not a YAML file of options"),
        ("a: [", "not a YAML file of options"),
        ("a: 2026-11-31", "not a YAML file of options"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--config: .*options\.yaml") as refusal:
        parse(proxy.parser(), tmp_path, text)
    assert message in refusal.value.message


def test_a_file_may_use_what_it_has_named_and_replace_parts_of_it(tmp_path: Path) -> None:
    file = (
        "connector_extra_config: &a {depth: 3, width: 4}\nkv_connector_extra_config: {<<: *a, depth: 5}\nmodel: demo\n"
    )
    found = parse(serve.parser(), tmp_path, file)
    assert found["kv_connector_extra_config"] == {"depth": 5, "width": 4}


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"--config: none\.yaml cannot be read"):
        proxy.parser().parse([], {"CHIASM_CONFIG": "none.yaml"})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse(proxy.parser(), tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(("text", "value"), [("1", True), ("off", False), ("TRUE", True)])
def test_the_environment_has_switches_and_several_values(text: str, value: bool) -> None:
    found = proxy.parser().parse([], {"CHIASM_ALLOW_CREDENTIALS": text, "CHIASM_PD": "http://a  http://b"})
    assert found == {"allow_credentials": value, "pd": ("http://a", "http://b")}


@pytest.mark.parametrize(("name", "text"), [("CHIASM_MAX_ITEMS", "x"), ("CHIASM_ALLOW_CREDENTIALS", "maybe")])
def test_what_is_wrong_in_the_environment_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} in the environment: '{text}' is not"):
        proxy.parser().parse([], {name: text})


def test_what_kubernetes_sets_beside_a_service_called_chiasm_is_no_port() -> None:
    assert proxy.parser().parse([], {"CHIASM_PORT": "tcp://10.0.0.1:8000"}) == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_variable_of_its_own(command: str) -> None:
    parser = COMMANDS[command]()
    names = {action.dest for action in parser._actions} - {"help"}
    assert "config" in names
    with pytest.raises(ConfigurationError, match="in the environment"):
        parser.parse([], {"CHIASM_MAX_BODY_BYTES" if command != "serve" else "CHIASM_PORT": "x"})


def test_a_dry_run_shows_commands_without_secrets_and_leaves_nothing(checkpoint: Path) -> None:
    secret = "secret" * 3
    arguments = ["--encoders", "1", "--pds", "1", "--port", "0", "--api-key", secret, "--admin-key", secret]
    arguments += ["--ec-store", f"redis://user:{secret}@localhost:1", "--dtype", "bfloat16"]
    settings = serve.parser().parse([str(checkpoint), *arguments, "--dry-run"], {})
    deployment = Deployment(serve.deployment_config(settings))
    shown = preview(deployment)
    assert secret not in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("  ")] == [
        "proxy",
        "instance",
        "instance",
    ]
    (of_proxy,) = (line for line in shown.splitlines() if line.startswith("  chiasm proxy"))
    assert "--encoder http://127.0.0.1:" in of_proxy
    assert "--api-key …" in of_proxy.replace("'", "")
    (of_encoder,) = (line for line in shown.splitlines() if "--role encoder" in line)
    assert "--dtype bfloat16" in of_encoder
    instance.parser().parse(of_encoder.replace("'", "").split()[2:], {})
    assert deployment.processes == []


def test_a_dry_run_shows_numbers_as_they_are(checkpoint: Path) -> None:
    arguments = ["--prefills", "1", "--decodes", "1", "--encoders", "0", "--port", "0", "--dry-run"]
    arguments += ["--deadline-seconds", "1234567.25", "--kv-lease-seconds", "1.23456789"]
    settings = serve.parser().parse([str(checkpoint), *arguments], {})
    shown = preview(Deployment(serve.deployment_config(settings)))
    assert shown.count("--deadline-seconds 1234567.25") == 3
    assert "--kv-lease-seconds 1.23456789 " in shown


@pytest.mark.parametrize("flags", ["--api-key one two", "--api_key one two", "--api-key=one --hf-token two"])
def test_a_dry_run_shows_none_of_several_secrets(flags: str) -> None:
    shown = _without_secrets(["vllm", "serve", "demo", *flags.split(), "--port", "80", "--ec-store", "redis://u:p@h"])
    assert not {"one", "two", "p"} & set(re.findall(r"\w+", " ".join(shown)))
    assert shown[-4:] == ["--port", "80", "--ec-store", "redis://…@h"]


def test_a_dry_run_names_the_encoders_that_run_only_while_they_are_needed(checkpoint: Path) -> None:
    settings = serve.parser().parse([str(checkpoint), "--encoders", "1..3", "--port", "0", "--dry-run"], {})
    deployment = Deployment(serve.deployment_config(settings))
    shown = preview(deployment)
    lines = shown.splitlines()
    spare = [line.partition(":")[0] for line in lines if line.endswith(", only while it is needed")]
    assert spare == ["encoder-1", "encoder-2"]
    (of_proxy,) = (line for line in lines if line.startswith("  chiasm proxy"))
    assert "--discover file:/" in of_proxy
    assert "--encoder " not in of_proxy
    assert deployment.scratch is not None
    assert not deployment.scratch.exists()
    assert f"mkdir -m 700 {deployment.scratch}" in shown  # without it, what instances share could not be opened
