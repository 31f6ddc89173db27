"""The paths that the proxy knows, against those that vLLM has: what it passes on, and what keeps tenants apart there."""

from __future__ import annotations

from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from fastapi.routing import APIRoute
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

from chiasm.proxy.other_paths import WITHOUT_SALT
from chiasm.wire import CHAT_PATH, COMPLETIONS_PATH, OTHER_PATHS

COMPUTES_NO_KV = {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}
NOT_PASSED_ON = {
    "operates an instance": {"/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests"},
    "is a probe": {"/ping"},
    "is one of the others by another name": {"/invocations"},
    "needs what one instance keeps": {"/v1/responses/{response_id}/cancel"},
    "is for instances that only render or only generate": {
        *("/v1/chat/completions/render", "/v1/messages/render", "/v1/completions/render", "/v1/responses/render"),
        *("/v1/chat/completions/derender", "/v1/completions/derender", "/inference/v1/generate"),
    },
    "takes a form": {"/v1/audio/transcriptions", "/v1/audio/translations"},
    "takes images, audio and video in members of its own": {"/v1/systemone"},
    "is missing from the oldest version that chiasm works with": {"/v1/decisions"},
}
"""Paths of vLLM that the proxy doesn't have, by reason."""
NEW_IN_0_33 = {"/v1/decisions"}


@pytest.fixture(scope="module")
def routes() -> dict[str, list[Any]]:
    """The types of the bodies that each path of vLLM takes by POST, for models that can do everything."""
    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    arguments = parser.parse_args(["--enable-scale-out"])
    tasks: Any = (
        "generate",
        "embed",
        "classify",
        "token_embed",
        "token_classify",
        "score",
        "transcription",
        "realtime",
    )
    model: Any = SimpleNamespace(
        get_pooling_task=lambda tasks: "embed",
        score_type="late-interaction",
        is_cross_encoder=True,
        hf_config=SimpleNamespace(num_labels=1),
    )
    app = build_app(arguments, tasks, model)
    found = [route for route in app.routes if isinstance(route, APIRoute) and "POST" in route.methods]
    return {one.path: _types(one.body_field.field_info.annotation) if one.body_field else [] for one in found}


def _types(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [each for one in get_args(annotation) for each in _types(one)]
    return [annotation]


def test_each_path_of_vllm_is_passed_on_or_left_out_for_a_reason(routes: dict[str, list[Any]]) -> None:
    left_out = set().union(*NOT_PASSED_ON.values())
    assert routes.keys() - left_out == {CHAT_PATH, COMPLETIONS_PATH, *OTHER_PATHS}
    assert left_out <= routes.keys() | NEW_IN_0_33


def test_vllm_takes_the_salt_of_a_tenant_wherever_the_proxy_relies_on_it(routes: dict[str, list[Any]]) -> None:
    passed_on = {path: routes[path] for path in (CHAT_PATH, COMPLETIONS_PATH, *OTHER_PATHS)}
    without = {path for path, types in passed_on.items() if any("cache_salt" not in one.model_fields for one in types)}
    assert without - COMPUTES_NO_KV == set(WITHOUT_SALT)
