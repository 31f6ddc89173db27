"""``chiasm instance``: one instance of a model, in one role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.cli.parser import Parser, option
from chiasm.engine.config import EngineConfig
from chiasm.extras import Extra, require
from chiasm.http.config import HttpConfig
from chiasm.kv_transfer import KVTransferConfig
from chiasm.launch.child import end_with_stdin
from chiasm.launch.config import model_name
from chiasm.launch.process import EC_OPTIONS, InstanceProcess, instance_process
from chiasm.launch.run import run_instance
from chiasm.media import MediaConfig
from chiasm.server import ServerConfig
from chiasm.wire import Role

MODEL_HELP = "A checkpoint's folder, a hub name, or demo."
END_WITH_STDIN = option("end_with_stdin", bool, "End when standard input closes, as it does when the parent dies.")


def parser() -> Parser:
    made = Parser(
        "instance",
        "MODEL --role ROLE [OPTIONS]",
        "Run one instance of MODEL.\n\nPrints `ready http://HOST:PORT` when it takes requests.",
        has_sources=True,
    )
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_option(option("role", Role, "Role of the instance."), required=True)
    made.add_option(END_WITH_STDIN)
    add_options(made)
    return made


def add_options(made: Parser) -> None:
    """Add what ``--encoder-args`` and the like may contain."""
    made.add("process", InstanceProcess)
    made.add("server", ServerConfig)
    made.add("engine", EngineConfig)
    embeddings = made.add_argument_group("embeddings")
    for config in EC_OPTIONS:
        made.add(embeddings, config)
    made.add("KV cache between prefill and decode", KVTransferConfig)
    made.add("HTTP", HttpConfig)
    made.add("images", MediaConfig)


def run(settings: Mapping[str, Any]) -> None:
    from chiasm.models import resolve_folder

    require(Extra.ENGINE, "The built-in engine")
    if settings.get("end_with_stdin"):
        end_with_stdin()
    name = {"served_model_name": model_name(settings["model"])}
    run_instance(instance_process(resolve_folder(settings["model"]), settings["role"], name | dict(settings)))
