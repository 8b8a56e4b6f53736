"""A profile from its settings to its folder."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from harli.engine import device
from harli.engine.launch import command, engine_arguments, launched, prepare_environment
from harli.engine.log import warnings
from harli.experiment import ENGINE_LOG, check_data
from harli.finetune.builtin import given_or_builtin
from harli.predictor_choice import identity
from harli.records.profile import PROFILE_FILE, Profile, ProfileInfo, read_profile
from harli.types import HarliError, Menu
from predictor.dataset import differences
from profiling.folder import ProfileFolder
from profiling.plan import Limits, Plan
from profiling.settings import ProfileSettings
from profiling.sitting import Progress, Sitting

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Profiling:
    """One profile on an engine of its own. Making it checks the settings; nothing is written before ``execute``."""

    def __init__(self, settings: ProfileSettings, resume: Path | None = None) -> None:
        """``resume``: a profile's folder to resume; it has to be of the same settings. Raises HarliError."""
        prepare_environment()
        self.settings = settings
        self.menu = _menu(settings.shares)
        self._arguments = engine_arguments(settings.engine)
        self._before = read_profile(resume) if resume else None
        if self._before is not None:
            _check_same(self._before, settings)
        if settings.finetune.data is not None:
            check_data(settings.finetune.data, self._arguments["model"], min(settings.microbatches))

    async def execute(
        self, folder: Path, on_start: Callable[[list[str]], None], on_progress: Callable[[Progress], None]
    ) -> ProfileInfo:
        """Measure until the budget is used up, and write the profile into ``folder``.

        Cancelling keeps what was measured; before anything was, it leaves no folder. Raises HarliError when the budget
        ends before the corners are done, or when the engine fails.
        """
        settings = self.settings
        with given_or_builtin(settings.finetune.data) as data:
            finetune = settings.finetune.model_copy(update={"data": data})
            target = ProfileFolder(folder, self._before)
            try:
                async with launched(settings.engine, folder / ENGINE_LOG) as engine:
                    on_start(warnings(folder / ENGINE_LOG))
                    await command(engine, "finetune", finetune.model_dump_json(), None, None)
                    return await self.sitting(engine, target, on_progress).run()
            except asyncio.CancelledError:
                if not (folder / PROFILE_FILE).exists():
                    shutil.rmtree(folder, ignore_errors=True)  # a log alone cannot be resumed, and is in the way
                raise

    def sitting(self, engine: AsyncLLM, folder: ProfileFolder, on_progress: Callable[[Progress], None]) -> Sitting:
        """Ready to measure with an engine that has a finetuning job. Raises HarliError if the plan does not fit it."""
        plan = self.plan(engine)
        return Sitting(engine, plan, self.settings, self.info(plan), folder, on_progress)

    def info(self, plan: Plan) -> ProfileInfo:
        """What is known when measuring begins, or goes on."""
        if self._before is not None:
            if self._before.info.plan != plan.described:
                raise HarliError(f"{self._before.folder} was measured with another plan; profile into a new folder")
            return self._before.info
        return ProfileInfo(
            profile_id=uuid.uuid4().hex,
            model=self.settings.engine.model,
            role=self.settings.engine.role,
            menu=[str(share) for share in device.menu().shares],
            device=device.describe(),
            versions=device.versions(),
            settings=self.settings.model_dump(mode="json"),
            plan=plan.described,
            started_at=datetime.now(UTC).isoformat(),
            status="running",
        )

    def plan(self, engine: AsyncLLM) -> Plan:
        cache = engine.vllm_config.cache_config
        limits = Limits(
            max_batch=self.settings.engine.max_num_seqs,
            max_context=self._arguments["max_model_len"],
            kv_tokens=int(0.9 * cache.num_gpu_blocks * cache.block_size),
        )
        settings = self.settings
        return Plan(
            seed=settings.seed,
            budget_s=settings.budget_s,
            menu=self.menu,
            limits=limits,
            microbatches=settings.microbatches,
            role=settings.engine.role,
        )


def plan_of(profile: Profile) -> Plan:
    """The plan that a profile was measured by."""
    described = profile.info.plan
    return Plan(
        seed=described["seed"],
        budget_s=described["budget_s"],
        menu=Menu.parse(described["shares"]),
        limits=Limits(**described["limits"]),
        microbatches=described["microbatches"],
        role=described["role"],
    )


def _menu(names: Sequence[str]) -> Menu:
    """The device's menu with only the splits called ``names``. Raises HarliError for one that does not exist."""
    menu = device.menu()
    wanted = [menu.get(name) for name in names] or menu.splits
    whole = (menu.decode_alone, menu.finetune_alone)
    splits = sorted(set(wanted).difference(whole), key=lambda share: share.finetune)
    return Menu((menu.decode_alone, *splits, menu.finetune_alone))


def _check_same(before: Profile, settings: ProfileSettings) -> None:
    """Raises HarliError when a profile cannot be resumed."""
    if before.info.status == "finished":
        raise HarliError(f"the profile in {before.folder} is finished; profile into a new folder")
    if reasons := differences(before.info.model_dump(), identity(settings.engine)):
        raise HarliError(f"{before.folder} cannot be resumed here: {reasons[0]}; profile into a new folder")
