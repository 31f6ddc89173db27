"""Checks of instances against each other: whether those that answer can work together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from chiasm.doctor.base import Check, Finding, shown
from chiasm.doctor.instances import Instance, Proxy
from chiasm.errors import ConfigurationError

Fleet = Sequence[Instance]

_PROXY = Check("proxy")
_INSTANCES = Check("instances")
_ROLES = Check("roles")
_MODEL = Check("model")
_CONTEXT = Check("context length")
_STORE = Check("EC store")
_KV = Check("KV connector")
_VERSIONS = Check("versions of instances")
_CLOCK = Check("clock")
_DEVICES = Check("devices of instances")
_THREADS = Check("threads")

_CLOCK_SECONDS = 3.0
_ROUNDING = 1e-6
_USES_EMBEDDINGS = ("pd", "prefill")
_EXCHANGES_EMBEDDINGS = ("encoder", *_USES_EMBEDDINGS)
_ANSWERS = ("pd", "aggregated", "prefill", "decode")


def proxy(seen: Proxy) -> Iterator[Finding]:
    """What the proxy makes of its instances."""
    for one in seen.instances:
        if one.state in ("unhealthy", "mismatched"):
            yield _PROXY.problem(
                f"it sends nothing to {one.role} {shown(one.url)}, which is {one.state}: {one.reason or 'no reason given'}",
                why="the rest of the fleet does its work, if it can.",
                do="start it again, or mend what the reason says; the proxy takes it back by itself.",
            )
        elif one.state != "healthy":
            yield _PROXY.warning(
                f"{one.role} {shown(one.url)} is {one.state}" + (f": {one.reason}" if one.reason else ""),
                why="the proxy sends it nothing meanwhile.",
                do="wait until it has started; its own log says how far it is.",
            )
    if seen.left_out:
        yield _PROXY.skipped(f"{seen.left_out} more instances than are looked at are behind it")
    if seen.status == "ok":
        yield _PROXY.ok(f"takes requests for {', '.join(seen.models)}; {len(seen.instances)} instances")
    else:
        yield _PROXY.problem(
            f"it takes no requests: its status is {seen.status or 'not told'}",
            why="clients get a 503.",
            do="see to the instances below; one pd or aggregated one has to be well, or one prefill and one decode.",
        )


def reachable(fleet: Fleet) -> Iterator[Finding]:
    for one in fleet:
        if one.trouble:
            yield _INSTANCES.problem(
                f"{one.name} {one.trouble}",
                why="it can do no work, and nothing more can be found out about it.",
                do="check the address, that the process runs, and its log; from here, this should answer:",
                command=f"curl -m 5 {shown(one.url)}/health",
            )
    if fleet and not any(one.trouble for one in fleet):
        yield _INSTANCES.ok(f"all {len(fleet)} answer and are well")


def composition(fleet: Fleet) -> Iterator[Finding]:
    """Whether the roles make a deployment together; of all instances that there are, well or not."""
    found = {one.role for one in fleet}
    whole = True
    for needs, needed in (("prefill", ("decode",)), ("decode", ("prefill",)), ("encoder", _USES_EMBEDDINGS)):
        if needs in found and not found.intersection(needed):
            whole = False
            yield _ROLES.problem(
                f"there are {needs} instances and no {' or '.join(needed)} instance",
                why=f"{needs} instances do a part of the work that {' or '.join(needed)} instances go on with.",
                do=f"start at least one {needed[0]} instance.",
                command=f"chiasm instance MODEL --role {needed[0]}",
            )
    if found.intersection(_USES_EMBEDDINGS) and "encoder" not in found:
        whole = False
        yield _ROLES.warning(
            "there is no encoder",
            why="text is answered; requests with images get a 503.",
            do="start an encoder, unless there are to be none.",
            command="chiasm instance MODEL --role encoder",
        )
    if whole:
        yield _ROLES.ok(", ".join(f"{sum(one.role == role for one in fleet)} {role}" for role in sorted(found)))


def roles(fleet: Fleet) -> Iterator[Finding]:
    """Whether each does what it is used for."""
    for one in fleet:
        if one.own_role and one.own_role != one.role:
            yield _ROLES.problem(
                f"{one.name} says that its role is {one.own_role}",
                why="each role does a part of the work, and no other.",
                do=f"use it as {one.own_role}, or start it with --role {one.role}.",
            )
        elif one.is_vllm and not one.says_what_it_is:
            yield _ROLES.skipped(
                f"{one.name} is vLLM without chiasm's middleware, and doesn't say what it is; add "
                "--middleware chiasm.integrations.vllm.middleware.ChiasmMiddleware to its command"
            )


def model(fleet: Fleet) -> Iterator[Finding]:
    """Served name, and what the fingerprint covers: weights, preprocessing and dtype."""
    names = _by(fleet, lambda one: one.model)
    if len(names) > 1:
        yield _MODEL.problem(
            f"instances serve different models: {_listing(names)}",
            why="embeddings and KV of one model mean nothing to another; the proxy sends nothing to those that differ.",
            do="start all instances with the same MODEL and the same --served-model-name.",
        )
    dtypes = _by(fleet, lambda one: one.dtype)
    prints = _by(fleet, lambda one: one.fingerprint)
    if len(prints) > 1:
        if len(dtypes) > 1:
            yield _MODEL.problem(
                f"instances compute in different dtypes: {_listing(dtypes)}",
                why="an embedding is in the encoder's dtype and is of no use to an instance with another: it never finds it.",
                do="start all instances with the same dtype.",
                command="--dtype bfloat16",
            )
        else:
            short = {value[:12]: instances for value, instances in prints.items()}
            yield _MODEL.problem(
                f"instances have different checkpoints under {'one name' if len(names) == 1 else 'different names'}: "
                f"{_listing(short)} (fingerprints of weights, preprocessing and dtype)",
                why="an embedding of one checkpoint is of no use to another: it is never found.",
                do="give all instances the same checkpoint folder, preprocessor_config.json included, and the same --dtype.",
            )
    silent = [one for one in fleet if not one.fingerprint]
    if silent:
        yield _MODEL.skipped(
            f"{_names(silent)} name no fingerprint, so that weights, preprocessing and dtype cannot be compared"
        )
    elif len(names) == 1 and len(prints) == 1:
        dtype = f", {next(iter(dtypes))}" if len(dtypes) == 1 else ""
        yield _MODEL.ok(f"all serve {next(iter(names))}{dtype}, fingerprint {next(iter(prints))[:12]}")


def context_length(fleet: Fleet) -> Iterator[Finding]:
    lengths = _by(
        [one for one in fleet if one.role in _ANSWERS],
        lambda one: f"{one.max_model_len} tokens" if one.max_model_len else "",
    )
    if len(lengths) > 1:
        yield _CONTEXT.warning(
            f"instances that answer take different lengths: {_listing(lengths)}",
            why="the longest prompts are refused or not, depending on the instance that they come to.",
            do="start them with the same --max-model-len.",
        )
    elif lengths:
        yield _CONTEXT.ok(next(iter(lengths)))
    else:
        yield _CONTEXT.skipped("no instance that answers says how long a prompt may be")


def ec_store(fleet: Fleet) -> Iterator[Finding]:
    """Whether embeddings go where they are looked for."""
    exchanging = [one for one in fleet if one.role in _EXCHANGES_EMBEDDINGS]
    if not exchanging:
        yield _STORE.skipped("no instance here exchanges embeddings")
        return
    stores = _by(exchanging, lambda one: one.ec_store)
    if len(stores) > 1:
        yield _STORE.problem(
            f"instances exchange embeddings through different folders: {_listing(stores)}",
            why="what an encoder writes into one is never found in the other: every image runs into its deadline.",
            do="start all of them with the same --shared-storage-path; on several machines or in containers that must be the "
            "same mounted folder. Each folder names itself in its file store-id.",
        )
    silent = [one for one in exchanging if not one.ec_store]
    if silent:
        yield _STORE.skipped(f"{_names(silent)} don't say through which folder they exchange embeddings")
    elif len(stores) == 1:
        yield _STORE.ok(f"one for all {len(exchanging)} instances that exchange embeddings: {next(iter(stores))}")


def kv_connector(fleet: Fleet) -> Iterator[Finding]:
    exchanging = [one for one in fleet if one.role in ("prefill", "decode")]
    if not exchanging:
        yield _KV.skipped("no instance here hands KV over")
        return
    connectors = _by(exchanging, lambda one: one.kv_connector)
    engines = _by(exchanging, lambda one: one.engine.partition(" ")[0])
    if len(connectors) > 1:
        yield _KV.problem(
            f"prefill and decode instances use different KV connectors: {_listing(connectors)}",
            why="decode cannot read what prefill offers.",
            do="start all of them with the same --kv-connector.",
        )
    if len(engines) > 1:
        yield _KV.problem(
            f"prefill and decode instances run different engines: {_listing(engines)}",
            why="each lays out KV in its own way; only embeddings travel between engines.",
            do="run prefill and decode instances with the same engine.",
        )
    silent = [one for one in exchanging if not one.kv_connector]
    if silent:
        yield _KV.skipped(f"{_names(silent)} don't say how they exchange KV")
    elif len(connectors) == 1 and len(engines) == 1:
        yield _KV.ok(f"{next(iter(connectors))} at all {len(exchanging)} prefill and decode instances")


def versions(fleet: Fleet) -> Iterator[Finding]:
    well = True
    own = _by(fleet, lambda one: one.version)
    if len(own) > 1:
        well = False
        yield _VERSIONS.warning(
            f"instances run different versions of chiasm: {_listing(own)}",
            why="entries and messages may differ between versions.",
            do="install the same version everywhere.",
        )
    engines = _by([one for one in fleet if one.vllm_version], lambda one: one.engine)
    for engine, instances in engines.items():
        if refused := vllm_refusal(engine.partition(" ")[2]):
            well = False
            yield _VERSIONS.problem(
                f"{_names(instances)}: {engine}",
                why=refused,
                do="install a version that is supported, or a newer chiasm.",
            )
    if len(engines) > 1:
        well = False
        yield _VERSIONS.warning(
            f"instances run different versions of vLLM: {_listing(engines)}",
            why="the messages between vLLM instances, and their KV, change from release to release.",
            do="install the same version everywhere.",
        )
    silent = [one for one in fleet if not one.version and not one.vllm_version]
    if silent:
        yield _VERSIONS.skipped(f"{_names(silent)} name no version")
    elif well:
        named = [*(f"chiasm {version}" for version in own), *engines]
        yield _VERSIONS.ok(", ".join(named))


def clocks(fleet: Fleet) -> Iterator[Finding]:
    told = [one for one in fleet if one.clock_seconds is not None]
    for one in told:
        ahead = one.clock_seconds or 0.0
        if abs(ahead) > _CLOCK_SECONDS:
            yield _CLOCK.warning(
                f"the clock of {one.name} is about {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's",
                why="the age of embeddings in a shared folder is compared across machines, and logs cannot be put in order.",
                do="let the machines take their time from the network.",
                command="timedatectl set-ntp true",
            )
    if silent := [one for one in fleet if one.clock_seconds is None]:
        yield _CLOCK.skipped(f"{_names(silent)} send no date")
    if told and all(abs(one.clock_seconds or 0.0) <= _CLOCK_SECONDS for one in told):
        yield _CLOCK.ok(f"{len(told)} instances agree with this machine to {_CLOCK_SECONDS:.0f} s")


def devices(fleet: Fleet) -> Iterator[Finding]:
    """What each computes on, and whether those that answer compute on the same kind of thing."""
    found = _by(fleet, lambda one: one.device)
    kinds = _by([one for one in fleet if one.role in _ANSWERS], lambda one: one.device.partition(":")[0])
    if len(kinds) > 1:
        yield _DEVICES.warning(
            f"instances that answer compute on different kinds of devices: {_listing(kinds)}",
            why="requests take far longer at the slower ones, and answers may differ where two tokens are about as likely.",
            do="start them with the same --device; where a GPU is not found, the instance's own log says why.",
        )
    elif found:
        yield _DEVICES.ok("; ".join(f"{device}: {_names(several)}" for device, several in found.items()))
    if silent := [one for one in fleet if not one.device]:
        yield _DEVICES.skipped(f"{_names(silent)} don't say what they compute on")


def threads(fleet: Fleet) -> Iterator[Finding]:
    """Whether instances that compute on one machine's CPUs leave each thread a core; of each address' host."""
    computing = [one for one in fleet if one.device == "cpu" and one.threads and one.cpus]
    for host, several in _by(computing, lambda one: urlsplit(one.url).hostname or "").items():
        load: defaultdict[int, float] = defaultdict(float)
        for one in several:
            for cpu in one.cpus:
                load[cpu] += (one.threads or 0) / len(one.cpus)
        total = sum(one.threads or 0 for one in several)
        said = f"{total} threads of {len(several)} instances on {len(load)} cores at {host}"
        if max(load.values()) > 1 + _ROUNDING:
            yield _THREADS.warning(
                said,
                why="threads that share a core wait for each other, in the middle of each operator.",
                do="run fewer instances there, give each fewer --threads, or CPUs of its own (--encoder-cpus, --pd-cpus).",
            )
        else:
            yield _THREADS.ok(said)
    if silent := [one for one in fleet if one.device in ("", "cpu") and one not in computing]:
        yield _THREADS.skipped(f"{_names(silent)} don't say how many threads they compute with")


CHECKS: tuple[Callable[[Fleet], Iterator[Finding]], ...] = (
    roles,
    model,
    context_length,
    ec_store,
    kv_connector,
    versions,
    devices,
    threads,
    clocks,
)
"""Of the instances that answer."""


def vllm_refusal(version: str) -> str:
    """Why chiasm's connector doesn't run in this version; empty if it does."""
    from chiasm.integrations.vllm import check_version

    try:
        check_version(version)
    except ConfigurationError as error:
        return error.message
    return ""


def _by(fleet: Fleet, value: Callable[[Instance], str]) -> dict[str, list[Instance]]:
    """Instances by a value, those left out that don't tell it."""
    found: defaultdict[str, list[Instance]] = defaultdict(list)
    for one in fleet:
        if told := value(one):
            found[told].append(one)
    return dict(found)


def _listing(groups: dict[str, list[Instance]]) -> str:
    return "; ".join(f"{value} at {_names(instances)}" for value, instances in groups.items())


def _names(instances: Sequence[Instance]) -> str:
    return ", ".join(one.name for one in instances)
