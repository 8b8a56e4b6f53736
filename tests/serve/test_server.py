"""``harli serve`` with an unmodified OpenAI client: requests, jobs, and the adapters that they make."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import torch

from harli.finetune.checkpoint import complete
from harli.models import resolve_model
from tests.serve.server_process import KEY, Server, sums

pytestmark = pytest.mark.slow

PROMPT = "12 plus 12?"
FEW = {"n_epochs": 2}
MANY = {"n_epochs": 1000}


def upload(server: Server, content: bytes, name: str = "data.jsonl") -> str:
    return server.client.files.create(file=(name, content), purpose="fine-tune").id


def create(server: Server, file: str, chosen: dict[str, Any], **more: Any) -> str:
    job = server.client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file,
        method={"type": "supervised", "supervised": {"hyperparameters": chosen}},
        **more,
    )
    return job.id


def wait_for(server: Server, job: str, condition: Callable[[Any], bool]) -> Any:
    """The job when ``condition`` holds; it must not end before."""
    while True:
        present = server.client.fine_tuning.jobs.retrieve(job)
        if condition(present):
            return present
        assert present.finished_at is None, present
        time.sleep(0.1)


def ended(job: Any) -> bool:
    return job.finished_at is not None


def updates(job: Any) -> int:
    return int(job.harli["updates_done"])


def complete_text(server: Server, model: str, prompt: str = PROMPT, tokens: int = 16) -> str:
    answer = server.client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0.0)
    return answer.choices[0].text


@pytest.fixture(scope="module")
def tuned(server: Server) -> Any:
    """A job that went well."""
    job = create(server, upload(server, sums(40)), FEW, suffix="sums", extra_body={"harli": {"lora_rank": 4}})
    return wait_for(server, job, ended)


def test_requests_are_answered_as_by_vllm(server: Server) -> None:
    whole = complete_text(server, "tiny")
    stream = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, temperature=0.0, stream=True)
    assert "".join(part.choices[0].text for part in stream) == whole
    chat = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 4
    assert "vllm:generation_tokens_total" in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/files", "/v1/fine_tuning/jobs", "/invocations", "/tokenize", "/docs"]
)
def test_only_a_key_opens(server: Server, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
        assert httpx.get(server.url + path, headers=headers).status_code == 401
    assert httpx.get(server.url + path, headers={"Authorization": f"Bearer {KEY}"}).status_code != 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_finished_job_is_served_at_once_under_its_name(server: Server, tuned: Any) -> None:
    assert (tuned.status, tuned.error) == ("succeeded", None)
    assert tuned.fine_tuned_model == f"ft:tiny:sums:{tuned.id.removeprefix('ftjob-')}"
    assert tuned.fine_tuned_model in [model.id for model in server.client.models.list()]
    assert server.client.models.retrieve(tuned.fine_tuned_model).parent == "tiny"
    events = list(server.client.fine_tuning.jobs.list_events(tuned.id, limit=100))
    losses = [event.data["train_loss"] for event in reversed(events) if event.data and "train_loss" in event.data]
    assert len(losses) == tuned.harli["updates"]
    assert losses[-1] < 0.75 * losses[0]
    assert tuned.trained_tokens > 0


def test_answers_equal_those_of_the_adapter_in_peft(server: Server, tuned: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, server.state / "jobs" / tuned.id / "adapter")
    for prompt in (PROMPT, "7 plus 7?", "Something else"):
        tokens = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**tokens, max_new_tokens=16, do_sample=False)
        expected = tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert complete_text(server, tuned.fine_tuned_model, prompt) == expected
    assert complete_text(server, tuned.fine_tuned_model) != complete_text(server, "tiny")


def test_adapter_and_base_do_not_touch_each_other_in_one_step(server: Server, tuned: Any) -> None:
    models = ["tiny", tuned.fine_tuned_model] * 3
    alone = {model: complete_text(server, model, tokens=48) for model in set(models)}

    async def all_at_once() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY)
        calls = [client.completions.create(model=m, prompt=PROMPT, max_tokens=48, temperature=0.0) for m in models]
        return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_at_once()) == [alone[model] for model in models]


def test_an_adapter_that_makes_held_out_text_less_likely_is_not_served(server: Server) -> None:
    training = b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaa"}\n' * 20
    validation = b'{"text": "The quick brown fox jumps over the lazy dog"}\n' * 2
    job = create(
        server,
        upload(server, training),
        {"n_epochs": 2, "learning_rate_multiplier": 4.0},
        validation_file=upload(server, validation),
    )
    failed = wait_for(server, job, ended)
    assert (failed.status, failed.fine_tuned_model) == ("failed", None)
    assert failed.error.code == "held_out_loss"
    assert not any(job.removeprefix("ftjob-") in model.id for model in server.client.models.list())


def test_bad_data_fails_the_job_with_a_line(server: Server) -> None:
    content = sums(20) + b'{"messages": [{"role": "assistant", "content": "hello"}]}\n'
    file = upload(server, content)
    job = create(server, file, FEW, validation_file=upload(server, sums(3)))
    failed = wait_for(server, job, ended)
    assert failed.status == "failed"
    assert f"{file}:21: messages:" in failed.error.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "another"}, "not the one that is served"),
        ({"training_file": "file-0"}, "no file 'file-0'"),
        ({"extra_body": {"harli": {"lora_rank": 64}}}, "--max-lora-rank"),
        ({"suffix": "../../etc"}, "suffix"),
        ({"method": {"type": "dpo"}}, "supervised"),
    ],
)
def test_an_impossible_job_is_refused(server: Server, change: dict[str, Any], reason: str) -> None:
    asked = {"model": "tiny", "training_file": upload(server, sums(10))} | change
    with pytest.raises(openai.BadRequestError, match=reason):
        server.client.fine_tuning.jobs.create(**asked)


def test_jobs_take_turns_and_a_higher_priority_goes_first(server: Server) -> None:
    file = upload(server, sums(20))
    first, second = create(server, file, MANY), create(server, file, MANY)
    for job in (first, second, first, second):  # each goes on after the other's turn
        before = updates(server.client.fine_tuning.jobs.retrieve(job))
        wait_for(server, job, lambda present, before=before: updates(present) > before)
    urgent = create(server, file, FEW, extra_body={"harli": {"priority": 1}})
    wait_for(server, urgent, lambda job: job.status == "running")
    before = [updates(server.client.fine_tuning.jobs.retrieve(job)) for job in (first, second)]
    assert wait_for(server, urgent, ended).status == "succeeded"
    server.client.fine_tuning.jobs.pause(first)
    server.client.fine_tuning.jobs.cancel(second)
    assert [server.client.fine_tuning.jobs.retrieve(job).status for job in (first, second)] == ["paused", "cancelled"]
    server.client.fine_tuning.jobs.resume(first)
    wait_for(server, first, lambda job: updates(job) > before[0])
    server.client.fine_tuning.jobs.cancel(first)
    with pytest.raises(openai.BadRequestError, match="not paused"):
        server.client.fine_tuning.jobs.resume(first)


def test_a_killed_server_goes_on_where_it_was(server: Server, tuned: Any) -> None:
    job = create(server, upload(server, sums(20)), MANY)
    folder = server.state / "jobs" / job
    while not complete(folder / "checkpoints"):
        time.sleep(0.05)
    answer = complete_text(server, tuned.fine_tuned_model)
    server.end(signal.SIGKILL)
    saved = int(complete(folder / "checkpoints")[-1].name.removeprefix("update-"))
    server.start()
    assert complete_text(server, tuned.fine_tuned_model) == answer
    wait_for(server, job, lambda present: updates(present) > saved)
    steps = [event.data["step"] for event in server.client.fine_tuning.jobs.list_events(job) if event.data]
    steps.reverse()
    again = len(steps) - 1 - steps[::-1].index(saved + 1)  # it may have got further once before
    assert steps[again:] == list(range(saved + 1, saved + 1 + len(steps) - again))
    server.client.fine_tuning.jobs.cancel(job)


def test_an_adapter_can_be_taken_away(server: Server, tuned: Any) -> None:
    ask = {"model": tuned.fine_tuned_model, "prompt": PROMPT, "max_tokens": 200, "temperature": 0.0}
    running = server.client.completions.create(**ask, stream=True, extra_body={"ignore_eos": True})
    next(running)
    assert server.client.models.delete(tuned.fine_tuned_model).deleted
    assert list(running)[-1].choices[0].finish_reason == "length"  # what runs ends as it began
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve(tuned.fine_tuned_model)
    assert tuned.fine_tuned_model not in [model.id for model in server.client.models.list()]
    with pytest.raises(openai.NotFoundError):
        complete_text(server, tuned.fine_tuned_model)


def test_a_server_that_is_told_to_end_saves_the_running_job(server: Server) -> None:
    """The last test, since no server is left."""
    job = create(server, upload(server, sums(20)), MANY)
    done = updates(wait_for(server, job, lambda present: updates(present) % 2 == 1))  # the next checkpoint is at 2
    assert server.end() == 0
    assert int(complete(server.state / "jobs" / job / "checkpoints")[-1].name.removeprefix("update-")) >= done
