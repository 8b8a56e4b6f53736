"""``DELETE /v1/models/MODEL``: an adapter that is to be served no more. vLLM has the other routes of models."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, HTTPException

from harli.serve.adapters import Adapters
from harli.serve.http import bad_request
from harli.serve.store import Store


def models_router(adapters: Adapters, store: Store) -> APIRouter:
    router = APIRouter(prefix="/v1/models")

    @router.delete("/{model:path}")
    async def delete(model: str) -> dict[str, Any]:
        job = store.job_of_model(model)
        if job is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no fine-tuned model {model!r}")
        if adapters.serves(model):
            with bad_request():
                await adapters.unload(model)
        store.forget_model(job.id)
        return {"id": model, "object": "model", "deleted": True}

    return router
