"""Checks of instances against each other: whether those that answer can work together.

Whether two instances fit is decided by ``proxy.agreement``, as in the proxy; here it is explained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from urllib.parse import urlsplit

from chiasm.doctor.observed import Observed, ObservedProxy
from chiasm.doctor.report import Check, Result, shown
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey
from chiasm.integrations.vllm import check_version
from chiasm.proxy.agreement import FOLDER_CONNECTOR, LANGUAGE_ROLES, PART_ROLES, difference, ec_mover
from chiasm.wire import Health, InstanceState, Role

PROXY = Check("proxy")
INSTANCES = Check("instances")
_ROLES = Check("roles")
_MODEL = Check("model")
_CONTEXT = Check("context length")
_STORE = Check("EC store")
_SHARED_CACHE = Check("shared cache use")
_KV = Check("KV connector")
_VERSIONS = Check("versions of instances")
_CLOCK = Check("clock")
_DEVICES = Check("devices of instances")
_THREADS = Check("threads")
_FLEET_KEY = Check("fleet key")

_CLOCK_SECONDS = 3.0
_ROUNDING = 1e-6
EMBEDDING_READERS = (Role.PD, Role.PREFILL)
_MIDDLEWARE = "--middleware chiasm.integrations.vllm.middleware.ChiasmMiddleware"
_SAME_VERSION = "install the same version everywhere."


def proxy(seen: ObservedProxy) -> Iterator[Result]:
    """Check what the proxy says about itself and its instances."""
    for one in seen.health.instances:
        says = f"{one.role} {shown(one.url)} is {one.state}" + (f": {one.reason}" if one.reason else "")
        if one.state in (InstanceState.UNHEALTHY, InstanceState.MISMATCHED):
            yield PROXY.problem(
                says,
                why="the proxy sends it nothing; the other instances do its work, if they can.",
                do="restart it, or fix the cause shown; the proxy uses it again by itself.",
            )
        elif one.state != InstanceState.HEALTHY:
            yield PROXY.warning(
                says,
                why="the proxy sends it nothing meanwhile.",
                do="wait until it has started, or if it is draining, until its last request has ended; its own log says more.",
            )
    if seen.left_out:
        yield PROXY.skipped(f"there are {seen.left_out} more instances behind it, too many to check")
    if seen.health.status == "ok":
        yield PROXY.ok(f"serves {', '.join(seen.health.models)}; {len(seen.health.instances)} instances")
    else:
        yield PROXY.problem(
            f"it accepts no requests: its status is {seen.health.status or 'unknown'}",
            why="clients get a 503.",
            do="fix the instances below; it needs one healthy PD or aggregated instance, or one prefill and one decode.",
        )


def health(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check whether each instance answers and is healthy."""
    for one in instances:
        if one.trouble:
            yield INSTANCES.problem(
                f"{one.name} {one.trouble}",
                why="it can't do any work, and can't be checked further.",
                do="check the address, whether the process runs, and its log; this should answer from here:",
                command=f"curl -m 5 {shown(one.url)}/health",
            )
    if instances and not any(one.trouble for one in instances):
        yield INSTANCES.ok(f"all {len(instances)} are healthy")


def composition(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check whether the roles make a deployment; ``instances`` are all that there are, healthy or not."""
    found = {one.role for one in instances}
    is_complete = True
    needs = {Role.PREFILL: (Role.DECODE,), Role.DECODE: (Role.PREFILL,), Role.ENCODER: EMBEDDING_READERS}
    for role, needed in needs.items():
        if role in found and not found.intersection(needed):
            is_complete = False
            others = " or ".join(needed)
            yield _ROLES.problem(
                f"there are {role} instances and no {others} instance",
                why=f"{role} instances do only a part of the work, and {others} instances do the rest.",
                do=f"start at least one {needed[0]} instance.",
                command=f"chiasm instance MODEL --role {needed[0]}",
            )
    if found.intersection(EMBEDDING_READERS) and Role.ENCODER not in found:
        is_complete = False
        yield _ROLES.warning(
            "there is no encoder",
            why="requests with text alone are answered, requests with images get a 503.",
            do="start an encoder, unless you want none.",
            command="chiasm instance MODEL --role encoder",
        )
    if is_complete:
        yield _ROLES.ok(", ".join(f"{sum(one.role == role for one in instances)} {role}" for role in sorted(found)))


def roles(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check whether each instance has the role that it is used as."""
    for one in instances:
        if one.health.role and one.health.role != one.role:
            yield _ROLES.problem(
                f"{one.name} says that its role is {one.health.role}",
                why="an instance can do the work of its own role only.",
                do=f"use it as {one.health.role}, or start it with --role {one.role}.",
            )
        elif one.is_vllm and not one.health.role:
            yield _ROLES.skipped(
                f"{one.name} is vLLM without chiasm's middleware and doesn't report its role; add {_MIDDLEWARE} to its command"
            )


def model(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check the model's name, and what the fingerprint covers: weights, preprocessing and dtype."""
    names = _by(instances, lambda one: one.health.model or "no model")
    dtypes = _by(instances, lambda one: one.health.dtype)
    fingerprints = _by(instances, lambda one: one.health.fingerprint[:12])
    one_name, one_fingerprint = _fit(instances, "model"), _fit(instances, "fingerprint", "dtype")
    if not one_name:
        yield _MODEL.problem(
            f"instances serve different models: {_listing(names)}",
            why="one model can't use another's embeddings or KV; the proxy sends nothing to the instances that differ.",
            do="start all instances with the same MODEL and the same --served-model-name.",
        )
    if not one_fingerprint and len(dtypes) > 1:
        yield _MODEL.problem(
            f"instances compute in different dtypes: {_listing(dtypes)}",
            why="an embedding has the encoder's dtype, and an instance with another dtype never finds it.",
            do="start all instances with the same dtype.",
            command="--dtype bfloat16",
        )
    elif not one_fingerprint:
        yield _MODEL.problem(
            f"instances have different checkpoints under {'one name' if one_name else 'different names'}: "
            f"{_listing(fingerprints)} (fingerprints of weights, preprocessing and dtype)",
            why="an instance never finds the embeddings of another checkpoint.",
            do="give all instances the same checkpoint folder, preprocessor_config.json included, the same --dtype and, "
            "of vLLM, the same --mm-processor-kwargs.",
        )
    if silent := [one for one in instances if not one.health.fingerprint]:
        yield _MODEL.skipped(
            f"{_names(silent)} report no fingerprint, so weights, preprocessing and dtype can't be compared"
        )
    elif one_name and one_fingerprint:
        dtype = f", {next(iter(dtypes))}" if len(dtypes) == 1 else ""
        yield _MODEL.ok(f"all serve {next(iter(names))}{dtype}, fingerprint {next(iter(fingerprints))}")


def context_length(instances: Sequence[Observed]) -> Iterator[Result]:
    answering = [one for one in instances if one.role in LANGUAGE_ROLES and one.health.max_model_len]
    lengths = _by(answering, lambda one: f"{one.health.max_model_len} tokens")
    if len(lengths) > 1:
        yield _CONTEXT.warning(
            f"instances have different context lengths: {_listing(lengths)}",
            why="whether a long prompt is refused depends on the instance that it is sent to.",
            do="start them with the same --max-model-len.",
        )
    elif lengths:
        yield _CONTEXT.ok(next(iter(lengths)))
    else:
        yield _CONTEXT.skipped("no instance reports its context length")


def ec_store(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check whether embeddings are moved by one connector, and through one folder if it uses one."""
    exchanging = [one for one in instances if one.role in (Role.ENCODER, *EMBEDDING_READERS)]
    movers = _by(exchanging, lambda one: ec_mover(one.health))
    stores = _by(exchanging, lambda one: one.health.ec_store)
    if not exchanging:
        yield _STORE.skipped("no instance here exchanges embeddings")
        return
    if len(movers) > 1:
        yield _STORE.problem(
            f"instances move embeddings with different connectors: {_listing(movers)}",
            why="what an encoder has made never arrives: every image runs into its deadline.",
            do="start all of them with the same --connector.",
        )
    elif len(stores) > 1:
        yield _STORE.problem(
            f"instances exchange embeddings through different folders: {_listing(stores)}",
            why="what an encoder writes to one folder is never found in the other: every image runs into its deadline.",
            do="start all of them with the same --shared-storage-path; on several machines or in containers, mount "
            "the same folder. Each folder has a name of its own in its file store-id.",
        )
    if silent := [one for one in exchanging if not ec_mover(one.health)]:
        yield _STORE.skipped(f"{_names(silent)} don't report how they exchange embeddings")
    elif unnamed := [one for one in exchanging if ec_mover(one.health) == FOLDER_CONNECTOR and not one.health.ec_store]:
        yield _STORE.skipped(f"{_names(unnamed)} don't report the folder through which they exchange embeddings")
    elif len(movers) == len(stores) == 1:
        yield _STORE.ok(f"{len(exchanging)} instances exchange embeddings through {next(iter(stores))}")
    elif len(movers) == 1 and not stores:
        places = [one.health.ec_place for one in exchanging if one.health.ec_place is not None]
        where = ", ".join(f"{place.host}:{place.port}" for place in places)
        says = f"{len(exchanging)} instances move embeddings by {next(iter(movers))}"
        yield _STORE.ok(f"{says} from {where}" if where else says)


def shared_cache(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check whether all that could read from a shared cache do; says nothing if none does."""
    readers = [one for one in instances if one.role in EMBEDDING_READERS]
    others = [one for one in readers if not one.health.reads_stored]
    if len(others) == len(readers):
        return
    if others:
        yield _SHARED_CACHE.warning(
            f"{_names(others)} can't read from the shared cache, but others can",
            why="the proxy asks it only if all language instances can read from it: every image goes to an encoder.",
            do="start them with --ec-store too; `vllm serve` takes it from CHIASM_EC_STORE, and reports it with chiasm's "
            "middleware.",
        )
    else:
        yield _SHARED_CACHE.ok(f"all {len(readers)} instances that read embeddings read from one")


def kv_connector(instances: Sequence[Observed]) -> Iterator[Result]:
    exchanging = [one for one in instances if one.role in PART_ROLES]
    connectors = _by(exchanging, lambda one: one.health.kv_connector or "")
    engines = _by(exchanging, lambda one: one.engine)
    one_engine = len({one.engine.partition(" ")[0] for one in exchanging}) == 1
    fit = one_engine and _fit(exchanging, "kv_connector", "engine")
    if not exchanging:
        yield _KV.skipped("no instance here exchanges KV")
    elif len(connectors) > 1:
        yield _KV.problem(
            f"prefill and decode instances use different KV connectors: {_listing(connectors)}",
            why="decode can't read what prefill offers.",
            do="start all of them with the same --kv-connector.",
        )
    elif not fit:
        yield _KV.problem(
            f"prefill and decode instances run different engines: {_listing(engines)}",
            why="each engine, and each version of vLLM, has its own layout of KV; only embeddings pass between them.",
            do="run prefill and decode instances with the same engine of the same version.",
        )
    if silent := [one for one in exchanging if not one.health.kv_connector]:
        yield _KV.skipped(f"{_names(silent)} don't report how they exchange KV")
    elif exchanging and fit:
        yield _KV.ok(f"{next(iter(connectors))} at all {len(exchanging)} prefill and decode instances")


def versions(instances: Sequence[Observed]) -> Iterator[Result]:
    results = []
    own = _by(instances, lambda one: one.health.version)
    if len(own) > 1:
        says = f"instances run different versions of chiasm: {_listing(own)}"
        why = "embeddings and messages may differ between versions."
        results.append(_VERSIONS.warning(says, why, _SAME_VERSION))
    engines = _by([one for one in instances if one.vllm_version], lambda one: one.engine)
    for engine, several in engines.items():
        try:
            check_version(several[0].vllm_version)
        except ConfigurationError as error:
            do = "install a version that is supported, or a newer chiasm."
            results.append(_VERSIONS.problem(f"{_names(several)}: {engine}", error.message, do))
    if len(engines) > 1:
        says = f"instances run different versions of vLLM: {_listing(engines)}"
        why = "vLLM's messages and its layout of KV change from release to release."
        results.append(_VERSIONS.warning(says, why, _SAME_VERSION))
    yield from results
    if silent := [one for one in instances if not one.health.version and not one.vllm_version]:
        yield _VERSIONS.skipped(f"{_names(silent)} report no version")
    elif not results:
        yield _VERSIONS.ok(", ".join([*(f"chiasm {version}" for version in own), *engines]))


def clocks(instances: Sequence[Observed]) -> Iterator[Result]:
    ahead = [(one, one.clock_seconds) for one in instances if one.clock_seconds is not None]
    wrong = [(one, seconds) for one, seconds in ahead if abs(seconds) > _CLOCK_SECONDS]
    for one, seconds in wrong:
        yield _CLOCK.warning(
            f"the clock of {one.name} is about {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's",
            why="the age of embeddings in a shared folder is compared across machines, and logs can't be put in order.",
            do="synchronize the clocks of the machines over the network.",
            command="timedatectl set-ntp true",
        )
    if silent := [one for one in instances if one.clock_seconds is None]:
        yield _CLOCK.skipped(f"{_names(silent)} send no date")
    if ahead and not wrong:
        yield _CLOCK.ok(f"{len(ahead)} instances are within {_CLOCK_SECONDS:.0f} s of this machine")


def devices(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check what each instance computes on, and whether all language instances compute on the same kind of device."""
    found = _by(instances, lambda one: one.health.device)
    language = [one for one in instances if one.role in LANGUAGE_ROLES]
    kinds = _by(language, lambda one: one.health.device.partition(":")[0])
    if len(kinds) > 1:
        yield _DEVICES.warning(
            f"instances that answer compute on different kinds of devices: {_listing(kinds)}",
            why="requests take far longer at the slower ones, and answers may differ where two tokens are equally likely.",
            do="start them with the same --device; if an instance finds no GPU, its own log says why.",
        )
    elif found:
        yield _DEVICES.ok("; ".join(f"{device}: {_names(several)}" for device, several in found.items()))
    if silent := [one for one in instances if not one.health.device]:
        yield _DEVICES.skipped(f"{_names(silent)} don't report what they compute on")


def threads(instances: Sequence[Observed]) -> Iterator[Result]:
    """Check, for the host of each address, whether each thread that computes on its CPUs has a core of its own."""
    on_cpu = [one for one in instances if one.health.device == "cpu" and one.health.threads and one.health.cpus]
    sharing = [one for one in on_cpu if one.health.shares_cores]
    if sharing:
        yield _THREADS.ok(f"{_names(sharing)} leave cores to each other")
    computing = [one for one in on_cpu if one not in sharing]
    for host, several in _by(computing, lambda one: urlsplit(one.url).hostname or "").items():
        load: defaultdict[int, float] = defaultdict(float)
        for one in several:
            for cpu in one.health.cpus:
                load[cpu] += (one.health.threads or 0) / len(one.health.cpus)
        total = sum(one.health.threads or 0 for one in several)
        says = f"{total} threads of {len(several)} instances on {len(load)} cores at {host}"
        if max(load.values()) > 1 + _ROUNDING:
            yield _THREADS.warning(
                says,
                why="threads that share a core wait for each other in the middle of each operator.",
                do="run fewer instances there, or give each fewer --threads or its own CPUs (--encoder-cpus, --pd-cpus).",
            )
        else:
            yield _THREADS.ok(says)
    if silent := [one for one in instances if one.health.device in ("", "cpu") and one not in on_cpu]:
        yield _THREADS.skipped(f"{_names(silent)} don't report how many threads they compute with")


def keys(instances: Sequence[Observed], own: FleetKey | None) -> Iterator[Result]:
    """Check whether all instances accept one fleet key; ``own`` is this command's."""
    without = [one for one in instances if not one.health.fleet_keys]
    having = [one for one in instances if one.health.fleet_keys]
    accepted = set.intersection(*(set(one.health.fleet_keys) for one in having)) if having else set()
    if having and not accepted:
        groups = _by(having, lambda one: one.health.fleet_keys[0])
        yield _FLEET_KEY.problem(
            f"instances have different fleet keys: {_listing({f'key {name}': some for name, some in groups.items()})}",
            why="a proxy has one key, and instances with another refuse what it sends.",
            do="give the proxy and all instances the same --fleet-key-file.",
        )
    elif having and not accept(having, own):
        yield _FLEET_KEY.skipped(
            "instances answer messages between instances only with their fleet key, so none is sent to them; give it to this "
            "command with --fleet-key-file or CHIASM_FLEET_KEY (`chiasm serve` without either makes one that only it knows)"
        )
    elif having:
        yield _FLEET_KEY.ok(f"{len(having)} instances accept this command's")
    if having and without:
        yield _FLEET_KEY.warning(
            f"{_names(without)} have no fleet key, but others do",
            why="whoever reaches them can send them what only the proxy should.",
            do="start them with the same --fleet-key-file; vLLM needs chiasm's middleware and CHIASM_FLEET_KEY.",
        )


def accept(instances: Sequence[Observed], own: FleetKey | None) -> bool:
    """Return whether there are instances, and all of them answer messages that are signed with ``own``, or not at all."""
    known = own.names[0] if own is not None else ""
    return bool(instances) and all(not one.health.fleet_keys or known in one.health.fleet_keys for one in instances)


CHECKS: tuple[Callable[[Sequence[Observed]], Iterator[Result]], ...] = (
    *(roles, model, context_length, ec_store, shared_cache, kv_connector, versions, devices, threads, clocks),
)
"""The checks of healthy instances."""


def _fit(instances: Sequence[Observed], *fields: str) -> bool:
    """Whether the proxy would use these instances together, judging by these fields of their health alone."""
    said = {tuple(getattr(one.health, name) for name in fields) for one in instances}
    parts = [Health(**dict(zip(fields, values, strict=True))) for values in said]
    return all(difference(one, other) is None for one, other in combinations(parts, 2))


def _by(instances: Sequence[Observed], value: Callable[[Observed], str]) -> dict[str, list[Observed]]:
    """Group instances by a value; those that don't report it are left out."""
    found: defaultdict[str, list[Observed]] = defaultdict(list)
    for one in instances:
        if reported := value(one):
            found[reported].append(one)
    return dict(found)


def _listing(groups: Mapping[str, Sequence[Observed]]) -> str:
    return "; ".join(f"{value} at {_names(instances)}" for value, instances in groups.items())


def _names(instances: Sequence[Observed]) -> str:
    return ", ".join(one.name for one in instances)
