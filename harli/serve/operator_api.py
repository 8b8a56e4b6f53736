"""``/harli``: how things stand, and what an operator may change while requests are served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from harli.config import SloSettings
from harli.serve.http import bad_request
from harli.serve.monitor import Monitor


class Switch(BaseModel):
    """Body of ``PUT /harli/finetuning``."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool


def operate_router(monitor: Monitor) -> APIRouter:
    router = APIRouter(prefix="/harli")

    @router.get("/state")
    async def state() -> dict[str, Any]:
        return monitor.state()

    @router.put("/finetuning")
    async def finetuning(switch: Switch) -> dict[str, Any]:
        await monitor.switch(switch.enabled)
        return monitor.state()

    @router.put("/slo")
    async def slo(limits: SloSettings) -> dict[str, Any]:
        with bad_request():
            await monitor.set_slo(limits)
        return monitor.state()

    return router
