"""Starts the server: vLLM's app around an engine with Harli inside, our routes, and the jobs."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.v1.engine.exceptions import EngineDeadError

from harli.config import RunSettings
from harli.records.schema import PredictorInfo
from harli.serve import vllm_server
from harli.serve.adapters import Adapters
from harli.serve.authenticate import RequireKey
from harli.serve.breaker import Breaker
from harli.serve.files import FileFolder
from harli.serve.files_api import files_router
from harli.serve.health_api import health_router
from harli.serve.jobs_api import jobs_router
from harli.serve.metrics import Metrics
from harli.serve.models_api import models_router
from harli.serve.monitor import Monitor
from harli.serve.operator_api import operate_router
from harli.serve.planning import Planner
from harli.serve.recorder import Recorder
from harli.serve.runner import JobRunner
from harli.serve.store import Store
from harli.types import HarliError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

DATABASE, FILES, JOBS, RECORDS = "jobs.sqlite", "files", "jobs", "records"
MAX_FILE_BYTES = 512 << 20
DIED = "the engine process died; start the server again, and jobs go on from their checkpoints"


async def serve(
    settings: RunSettings,
    arguments: Namespace,
    keys: Sequence[str],
    state: Path,
    turn_s: float,
    predictor: PredictorInfo | None,
    min_attainment: float,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; then the running job is saved.

    Args:
        settings: ``finetune`` is what jobs get that do not say otherwise; ``workload`` is not used.
        arguments: of vLLM's server.
        keys: that clients have to show one of, if there are any.
        state: folder of files, jobs and their database.
        turn_s: how long a job runs while others of the same priority wait.
        predictor: that the policy uses.
        min_attainment: finetuning is switched off below it, see ``harli.serve.breaker``.
        on_ready: called with the address when requests are served from now on.

    Raises HarliError if the server cannot start, or the engine dies.
    """
    state = state.absolute()
    try:
        state.mkdir(parents=True, exist_ok=True)
        address, socket = vllm_server.setup_server(arguments, reuse_port=False)
    except OSError as error:
        raise HarliError(f"cannot serve on {arguments.host}:{arguments.port} from {state}: {error.strerror}") from error
    base_model = arguments.served_model_name[0]
    with closing(Store(state / DATABASE)) as store, closing(socket):
        if others := store.base_models() - {base_model}:
            raise HarliError(f"{state} holds jobs and adapters of {others.pop()}: serve that, or give another --state")
        async with _engine(arguments) as engine:
            tasks = await engine.get_supported_tasks()
            app = vllm_server.build_app(arguments, tasks, engine.model_config)
            await vllm_server.init_app_state(engine, app.state, arguments, tasks)
            files = FileFolder(state / FILES, store)
            adapters = Adapters(app.state.openai_serving_models)
            planner = Planner(settings.finetune, arguments.tokenizer or arguments.model)
            recorder = Recorder(state / RECORDS, settings, predictor)
            monitor = Monitor(engine, store, settings, recorder, Breaker(min_attainment), Metrics())
            runner = JobRunner(
                engine,
                store,
                files,
                planner,
                adapters,
                state / JOBS,
                turn_s,
                lambda: monitor.held_back,
                monitor.add_updates,
            )
            app.include_router(files_router(files, store, MAX_FILE_BYTES))
            app.include_router(jobs_router(store, state / JOBS, base_model, arguments.max_lora_rank))
            app.include_router(models_router(adapters, store))
            app.include_router(operate_router(monitor))
            app.include_router(health_router(monitor))
            if keys:
                app.middleware_stack = RequireKey(app.middleware_stack or app.build_middleware_stack(), keys)
            async with monitor.running(), _running(runner, engine):
                socket.listen()  # whoever connects from here on waits for the server rather than being refused
                on_ready(address if arguments.uds else f"{address.rpartition(':')[0]}:{socket.getsockname()[1]}")
                ending = await vllm_server.serve_http(app, socket, **vllm_server.http_options(arguments))
                died = engine.errored and not runner.stopping
        await ending
    if died:
        raise HarliError(DIED)


@asynccontextmanager
async def _engine(arguments: Namespace) -> AsyncIterator[AsyncLLM]:
    """vLLM's engine. Raises HarliError if it does not start."""
    async with AsyncExitStack() as stack:
        try:
            engine = await stack.enter_async_context(vllm_server.build_async_engine_client(arguments))
        except (RuntimeError, ValueError) as error:
            raise HarliError(f"the engine did not start: {str(error).splitlines()[0]}; the log has more") from error
        yield engine


@asynccontextmanager
async def _running(runner: JobRunner, engine: AsyncLLM) -> AsyncIterator[None]:
    """Jobs run inside. vLLM's server ends by shutting the engine down, so the running job is saved before that."""
    loop, shutdown = asyncio.get_running_loop(), engine.shutdown

    def save_first(timeout: float | None = None) -> None:  # called in a thread
        asyncio.run_coroutine_threadsafe(runner.stop(), loop).result()
        shutdown(timeout=timeout)

    try:
        engine.shutdown = save_first
        try:
            await runner.start()
        except EngineDeadError:
            raise HarliError(DIED) from None
        yield
    finally:
        engine.shutdown = shutdown
        await runner.stop()
