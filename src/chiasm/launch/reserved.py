"""Settings that a deployment chooses itself: given for some instances, they would keep it from ever getting ready."""

from __future__ import annotations

from collections.abc import Iterable

from chiasm.errors import ConfigurationError
from chiasm.options import flag
from chiasm.wire import Role

_OF_ALL = "give it to `chiasm serve` itself, for all instances"
_ADDRESS = "instances get addresses of their own on this machine; --host and --port of `chiasm serve` are the proxy's"
_OF_SERVE = "give it to `chiasm serve` itself"
_INSTANCES = "`chiasm serve` starts the instances; for others, run `chiasm proxy`"
_INSTANCE = {
    "host": _ADDRESS,
    "port": _ADDRESS,
    "advertise_url": _ADDRESS,
    "served_model_name": _OF_ALL,
    "connector": _OF_ALL,
    "connector_module_path": _OF_ALL,
    "connector_extra_config": _OF_ALL,
    "shared_storage_path": _OF_ALL,
    "ec_max_bytes": _OF_ALL,
    "ec_store": _OF_ALL,
    "ec_store_read_bytes": _OF_ALL,
    "ec_store_queue_bytes": _OF_ALL,
    "kv_connector": _OF_ALL,
    "kv_connector_module_path": _OF_ALL,
    "kv_connector_extra_config": _OF_ALL,
    "shutdown_timeout_seconds": _OF_ALL,
    "fleet_key_file": _OF_ALL,
    "ssl_certfile": "the proxy speaks plain HTTP with the instances of its machine",
    "ssl_keyfile": "the proxy speaks plain HTTP with the instances of its machine",
    "core_share": "the layout chooses which instances share cores",
    "cpus": "use --encoder-cpus, --pd-cpus and the like",
}
_PROXY = {
    **dict.fromkeys(
        ("host", "port", "admin_key", "admin_key_file", "fleet_key_file", "shutdown_timeout_seconds", "ec_store"),
        _OF_SERVE,
    ),
    **dict.fromkeys(map(str, Role), _INSTANCES),
}
_VLLM = {
    "--host": _ADDRESS,
    "--port": _ADDRESS,
    "--uds": _ADDRESS,
    "--served-model-name": _OF_ALL,
    "--model": "the model is the first argument of `chiasm serve`",
    "--shutdown-timeout": "give --shutdown-timeout-seconds to `chiasm serve` itself",
    "--ssl-keyfile": "the proxy speaks plain HTTP with the instances of its machine",
    "--ssl-certfile": "the proxy speaks plain HTTP with the instances of its machine",
    "--headless": "every instance answers HTTP",
}


def check_instance(where: str, names: Iterable[str]) -> None:
    """Raise ConfigurationError if settings of some instances, given by ``where``, are for the deployment to choose."""
    _check(where, {name: flag(name) for name in names}, _INSTANCE)


def check_proxy(where: str, names: Iterable[str]) -> None:
    """The same for settings of the proxy."""
    _check(where, {name: flag(name) for name in names}, _PROXY)


def check_vllm(where: str, flags: Iterable[str]) -> None:
    """The same for arguments of ``vllm serve``."""
    given = [argument.partition("=")[0].replace("_", "-") for argument in flags if argument.startswith("--")]
    _check(where, {name: name for name in given}, _VLLM)


def _check(where: str, given: dict[str, str], reserved: dict[str, str]) -> None:
    for name, shown in given.items():
        if name in reserved:
            raise ConfigurationError(f"{where}: {shown} is not for single processes: {reserved[name]}.")
