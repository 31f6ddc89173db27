"""What can be read of the proxy: its health, its metrics, the models that it serves."""

from __future__ import annotations

import time

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from chiasm.proxy.fleet import LANGUAGE_ROLES
from chiasm.proxy.gateway import Gateway
from chiasm.proxy.metrics import CONTENT_TYPE


class Pages:
    """Handlers of the routes that only read."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 if text can be answered, else 503."""
        fleet = self._gateway.fleet
        ready = fleet.missing is None
        return answer_json(
            200 if ready else 503,
            {
                "status": "ok" if ready else "unavailable",
                "models": fleet.models,
                "instances": [instance.describe() for instance in fleet.instances],
            },
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._gateway.metrics.render(), media_type=None, headers={"content-type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return answer_json(
            200, {"object": "list", "data": [self._describe(name) for name in self._gateway.fleet.models]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._gateway.fleet.models:
            raise HTTPException(404, f"the model {name[:200]!r} is not served here")
        return answer_json(200, self._describe(name))

    def _describe(self, name: str) -> dict[str, object]:
        lengths = [
            instance.report.max_model_len
            for instance in self._gateway.fleet.healthy(*LANGUAGE_ROLES)
            if instance.report is not None and instance.report.max_model_len is not None
        ]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "chiasm",
            "max_model_len": min(lengths, default=None),
        }


def answer_json(status: int, content: object) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
