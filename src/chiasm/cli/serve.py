"""``chiasm serve``: everything on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from chiasm.cli import instance, proxy
from chiasm.cli.parser import Parser, option
from chiasm.engine.config import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.http.config import HttpConfig
from chiasm.kv_transfer import KVTransferConfig
from chiasm.launch.config import OF_EC, OF_KV, OF_STORE, DeploymentConfig, EngineKind, RoleConfig
from chiasm.launch.process import EC_OPTIONS, ProcessConfig
from chiasm.media import MediaConfig
from chiasm.options import NamedOption, flag, names_of
from chiasm.proxy import ProxyConfig
from chiasm.wire import Role

_POLL_SECONDS = 0.1
_POLLS_BETWEEN_LOOKS = 5
_POLLS_BETWEEN_LINES = 300
_OF_DEPLOYMENT = ("engine", "layout", "devices", "served_model_name")
_OF_LAYOUT = ("threads", "core_share", "nice")
"""Options of the engine that the layout chooses for each instance."""
_OF_PROXY = (
    "host",
    "port",
    "admin_key",
    "admin_key_file",
    "fleet_key_file",
    "deadline_seconds",
    "shutdown_timeout_seconds",
)
_OF_PROXY_ALONE = ("otlp_traces_endpoint",)
"""Options of the proxy that say nothing about the deployment."""
_OF_ROLE = ("cpus", "devices", "memory_share")
_COUNTS = {
    Role.ENCODER: "encoders",
    Role.PD: "pds",
    Role.AGGREGATED: "aggregated",
    Role.PREFILL: "prefills",
    Role.DECODE: "decodes",
}
_UNSET_COUNTS = {
    Role.ENCODER: "chosen by the layout; beside other counts 1, or 0 with --aggregated",
    Role.PD: "chosen by the layout; beside other counts 1, or 0 if there are others",
}


def parser() -> Parser:
    made = Parser(
        "serve",
        "MODEL [OPTIONS]",
        "Run instances of MODEL and the proxy, all on this machine.\n\n"
        "Prints `ready http://HOST:PORT` when every instance is healthy.",
        has_sources=True,
    )
    made.add_argument("model", metavar="MODEL", help=instance.MODEL_HELP)
    made.add_option(option("dry_run", bool, "Print what would be started, and start nothing."))
    add_options(made)
    return made


def add_options(made: Parser) -> None:
    """Add all options."""
    made.add("deployment", DeploymentConfig, only=_OF_DEPLOYMENT)
    of_proxy = made.add_argument_group("proxy")
    made.add(of_proxy, ProxyConfig, only=(*_OF_PROXY, *_OF_PROXY_ALONE))
    made.add(of_proxy, HttpConfig)
    made.add_arguments("proxy_args", "More arguments for `chiasm proxy`, in quotes.", of_proxy)
    instances = made.add_argument_group("all instances")
    made.add(instances, RoleConfig, only=("threads",))
    made.add(instances, ProcessConfig, only=("log_level",))
    made.add_arguments("vllm_args", "More arguments for every `vllm serve`, in quotes.", instances)
    for role in Role:
        title = f"{'PD' if role is Role.PD else role} instances"
        group = made.add_argument_group(title)
        made.add_option(_count_option(role, title), group)
        made.add(group, RoleConfig, only=_OF_ROLE, prefix=f"{role}_")
        made.add_arguments(f"{role}_args", "More arguments for each of these instances, in quotes.", group)
    made.add("engine", EngineConfig, without=_OF_LAYOUT)
    embeddings = made.add_argument_group("embeddings")
    made.add(embeddings, DeploymentConfig, only=("connector",))
    for config in EC_OPTIONS:
        made.add(embeddings, config, only={*OF_EC, *OF_STORE} - {"connector"})
    made.add("KV cache between prefill and decode", KVTransferConfig, only=OF_KV)
    made.add("images", MediaConfig)


def _count_option(role: Role, title: str) -> NamedOption:
    unset = _UNSET_COUNTS.get(role, "0")
    if role is not Role.ENCODER:
        return option(_COUNTS[role], int, f"Number of {title}.", min=0, unset=unset)
    text = f"Number of {title}, or the fewest and the most, which then come and go by what is needed: 1..4."
    return option(_COUNTS[role], tuple[int, int], text, metavar="N", unset=unset)


def run(settings: Mapping[str, Any]) -> None:
    """Run a deployment until a signal asks for its end, and until what runs has ended."""
    from chiasm.cli.view import View
    from chiasm.launch import Deployment
    from chiasm.launch.devices import describe
    from chiasm.launch.signals import EndSignals

    if settings.get("dry_run"):
        from chiasm.cli.dry_run import preview

        print(preview(Deployment(deployment_config(settings))))
        return
    view = View()
    deployment = Deployment(deployment_config(settings), on_change=view.change, on_line=view.line)
    view.line("serve", deployment.arrangement.description)
    if placed := describe(deployment.placements):
        view.line("serve", placed)
    with EndSignals() as signals, view, deployment:
        view.show(lambda: deployment.processes)
        announced, polls = False, 0
        while signals.received is None:
            deployment.check()
            if not announced and deployment.is_ready():
                view.ready(deployment.url)
                announced = True
            polls += 1
            if polls % _POLLS_BETWEEN_LOOKS == 0:
                deployment.look()
            if not announced and polls % _POLLS_BETWEEN_LINES == 0 and (waiting := deployment.waiting_for()):
                view.line("serve", f"waiting for {waiting}")
            time.sleep(_POLL_SECONDS)
        seconds = deployment.config.shutdown_timeout_seconds
        view.line("serve", f"stopping: what runs has {seconds:g} s to end; a second signal ends it at once")
        deployment.drain(lambda: signals.are_repeated)


def deployment_config(settings: Mapping[str, Any]) -> DeploymentConfig:
    """Return the deployment that a person asks for. Raises ConfigurationError for what cannot work together."""
    of_all = _chosen(settings, "log_level", *names_of(EngineConfig, MediaConfig).difference(_OF_LAYOUT))
    of_proxy = _chosen(of_all, "log_level", "max_items", *names_of(MediaConfig))
    of_proxy |= _chosen(settings, *_OF_PROXY_ALONE, *names_of(HttpConfig))
    of_proxy |= _parsed("proxy_args", settings, proxy.add_options)
    own = (*_OF_DEPLOYMENT, *_OF_PROXY, *OF_KV, *OF_EC, *OF_STORE)
    least, most = settings.get("encoders", (None, None))
    counts = instance_counts(settings if most is None else {**settings, "encoders": most})
    roles = {role: _role_config(role, count, settings) for role, count in counts.items()}
    missing = {role: _role_config(role, 0, settings) for role in Role if role not in roles}
    roles |= {role: one for role, one in missing.items() if one.own_options(role)}  # which is refused
    if least != most:
        roles[Role.ENCODER] = replace(roles[Role.ENCODER], least=least)
    return DeploymentConfig(
        roles=roles,
        settings=of_all,
        proxy_settings=of_proxy,
        vllm_flags=settings.get("vllm_args", ()),
        **{"port": ProxyConfig.port, **_chosen(settings, "model", *own)},
    )


def instance_counts(settings: Mapping[str, Any]) -> Mapping[Role, int | None]:
    """Return the instances of each role, at most. Without any count it is None for every role: the layout decides."""
    if not any(name in settings for name in _COUNTS.values()):
        return dict.fromkeys(Role)
    apart = bool(settings.get("prefills") or settings.get("decodes"))
    aggregated = bool(settings.get("aggregated"))
    defaults = {Role.ENCODER: int(apart or not aggregated), Role.PD: int(not apart and not aggregated)}
    counts = {role: settings.get(name, defaults.get(role, 0)) for role, name in _COUNTS.items()}
    return {role: count for role, count in counts.items() if count} or counts


def _role_config(role: Role, count: int | None, settings: Mapping[str, Any]) -> RoleConfig:
    own = {name: settings[f"{role}_{name}"] for name in _OF_ROLE if f"{role}_{name}" in settings}
    name = f"{role}_args"
    if settings.get("engine") is EngineKind.VLLM:
        return RoleConfig(count, settings.get("threads"), vllm_flags=settings.get(name, ()), **own)
    return RoleConfig(count, settings.get("threads"), settings=_parsed(name, settings, instance.add_options), **own)


def _parsed(name: str, settings: Mapping[str, Any], add_options: Callable[[Parser], None]) -> dict[str, Any]:
    """Return the settings in the value of an option such as ``--pd-args``. Raises ConfigurationError."""
    if name not in settings:
        return {}
    parser = Parser(name, "", "", add_help=False)
    add_options(parser)
    try:
        return parser.parse(settings[name], environment={})
    except ConfigurationError as error:
        raise ConfigurationError(f"{flag(name)}: {error.message}") from None


def _chosen(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}
