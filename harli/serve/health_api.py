"""``/harli/health``: decode's health, with finetuning's beside it, which is no reason to restart anything."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from harli.serve.monitor import Monitor


def health_router(monitor: Monitor) -> APIRouter:
    router = APIRouter(prefix="/harli")

    @router.get("/health")
    async def health() -> JSONResponse:
        """200 while decode is fine, whatever has become of finetuning; else 503."""
        fine = monitor.decode == "ok"
        content = {"decode": monitor.decode, "finetuning": monitor.finetuning}
        return JSONResponse(content, HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE)

    return router
