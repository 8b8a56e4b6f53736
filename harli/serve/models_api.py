"""``/v1/models/MODEL``: what is served, and an adapter that is to be served no more. The list is vLLM's own route."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from harli.serve.adapters import Adapters
from harli.serve.http import bad_request
from harli.serve.store import Store


def models_router(adapters: Adapters, store: Store) -> APIRouter:
    router = APIRouter(prefix="/v1/models")

    @router.get("/{model:path}")
    async def retrieve(model: str, request: Request) -> dict[str, Any]:
        served = await request.app.state.openai_serving_models.show_available_models()
        for card in served.data:
            if card.id == model:
                described: dict[str, Any] = card.model_dump()
                return described
        raise HTTPException(HTTPStatus.NOT_FOUND, f"no model {model!r}")

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
