"""``harli run`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harli.cli import main
from harli.records.reader import read_record
from harli.records.summary import METRICS

AZURE = Path(__file__).resolve().parents[3] / "shared" / "data" / "azure_llm_2023_conv.csv"
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(
    f"2023-11-16 18:15:{i % 60:02d}.{(i * 37) % 100:02d}00000,{50 + 31 * i % 900},{10 + 7 * i % 60}" for i in range(20)
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "harli", *arguments]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command that runs in ``folder``, in a process group of its own as in a terminal."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(*arguments), cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on ``tiny``: a trace, finetuning data of our own, a share, a parameter."""
    folder = tmp_path_factory.mktemp("run")
    trace = AZURE
    if not trace.exists():
        trace = folder / "trace.csv"
        trace.write_text(TRACE)
    data = folder / "data.jsonl"
    samples = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, samples)))
    done = subprocess.run(
        command(
            *("run", "--policy", "static", "--param", "work_conserving=true", "--model", "tiny", "--json"),
            *("--trace", str(trace), "--finetune-data", str(data), "--duration", "8", "--slo-tpot-ms", "500"),
            *("--max-model-len", "512", "--kv-cache-gib", "0.5", "--out", "record"),
        ),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"folder": folder, "metrics": json.loads(done.stdout), "stderr": done.stderr}


def test_json_has_every_metric(finished: dict[str, Any]) -> None:
    metrics = finished["metrics"]
    assert tuple(metrics) == METRICS
    assert metrics["decode/requests_completed"] > 0
    assert metrics["decode/requests_failed"] == 0
    assert metrics["slo/tpot_attainment"] == 1.0
    assert metrics["slo/itl_attainment"] is None
    assert metrics["finetune/updates"] >= 1
    assert metrics["finetune/tokens_per_s"] > 0
    assert metrics["memory/lent_peak"] > 0.5


def test_the_record_and_the_adapter_are_complete(finished: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from harli.models import resolve_model

    record = read_record(finished["folder"] / "record")
    assert record.info.status == "finished"
    assert record.info.summary == finished["metrics"]
    assert record.info.finetune.state == "finished"
    assert record.info.finetune.shared_bytes == record.info.finetune.base_bytes > 0
    assert len(record.requests) == finished["metrics"]["decode/requests_completed"]
    assert record.info.finetune.adapter == "adapter"
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    PeftModel.from_pretrained(base, record.folder / "adapter")
    assert "clipped" in finished["stderr"]


def test_the_run_is_in_mlflow(finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from harli.tracking.publish import EXPERIMENT
    from harli.tracking.store import open_store

    monkeypatch.chdir(finished["folder"])
    client, experiment = open_store(EXPERIMENT)
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == run.data.params["policy"] == "static"
    assert run.data.metrics["finetune/updates"] == finished["metrics"]["finetune/updates"]
    assert "timeline.png" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


def test_ctrl_c_keeps_what_was_measured_and_the_adapter(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        *("run", "--policy", "static", "--model", "tiny", "--requests-per-s", "3", "--duration", "600"),
        *("--max-model-len", "512", "--kv-cache-gib", "0.5", "--out", "record", "--microbatch-tokens", "64"),
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:  # printed once the engine is up
        seen += line
        if "running" in line:
            break
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)
    output, rest = process.communicate(timeout=120)
    assert process.returncode == 130, seen + rest
    assert "Traceback" not in rest
    assert "interrupted" in output
    record = read_record(tmp_path / "record")
    assert record.info.status == "interrupted"
    assert len(record.steps) > 10
    assert record.info.summary["finetune/updates"] >= 1
    assert (tmp_path / "record" / "adapter" / "adapter_model.safetensors").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    process = start(
        tmp_path, "run", "--policy", "static", "--model", "tiny", "--kv-cache-gib", "0.5", "--out", "record"
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "starting the engine" in line:
            break
    time.sleep(1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert read_record(tmp_path / "record").info.status == "running"


def test_ctrl_c_while_the_engine_starts_is_an_interruption_not_a_failure(tmp_path: Path) -> None:
    process = start(
        tmp_path, "run", "--policy", "static", "--model", "tiny", "--kv-cache-gib", "0.5", "--out", "record"
    )
    log = tmp_path / "record" / "engine.log"
    while process.poll() is None and not (log.exists() and log.stat().st_size):  # the engine's process writes
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert read_record(tmp_path / "record").info.status == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "statik"], "did you mean 'static'"),
        (["--policy", "static", "--param", "shar=1/1"], "did you mean 'share'"),
        (["--policy", "static", "--param", "share=9/9"], "no share '9/9'"),
        (["--policy", "static", "--param", "share"], "key=value"),
        (["--policy", "static", "--param", "work_conserving=maybe"], "work_conserving"),
        (["--policy", "static", "--slo-tpot-ms", "0"], "tpot_ms"),
        (["--policy", "static", "--duration", "-1"], "duration_s"),
        (["--policy", "static", "--role", "prefill"], "role"),
        (["--policy", "static", "--trace", "missing.csv"], "missing.csv"),
        (["--policy", "static", "--finetune-data", "missing.jsonl"], "missing.jsonl"),
        (["--policy", "static", "--finetune-data", "broken.jsonl"], "broken.jsonl:2"),
        (["--policy", "static", "--model", "no/folder/here"], "no/folder/here"),
        (["--policy", "static", "--out", "taken"], "not empty"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harli", "run", "--model", "tiny", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harli: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
