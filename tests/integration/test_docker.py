"""The services of docker/compose.yaml, run as processes: a capture that is stopped and goes on, then a student."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from cache_spec.validate import verify_cache
from tests.clusters import wait_until
from tests.compose import services
from tests.models import make_folder, write_words


@pytest.mark.slow
def test_the_services_make_a_cache_and_a_student_and_a_stopped_capture_goes_on(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    teacher = str(make_folder(inputs / "teacher", n_layer=1))
    recipe = {
        "cache-teacher": {
            "teacher": teacher,
            "text": [str(write_words(inputs / "text.jsonl", num_documents=40))],
            "encoding": "topk",
            "k": 4,
            "block_tokens": 16,
            "batch_blocks": 1,
            "shard_blocks": 1,
            "hidden_window": 8,
        },
        "train-student": {
            "teacher": teacher,
            "num_layers": 1,
            "batch_blocks": 8,
            "max_steps": 2,
            "tensorboard": False,
        },
    }
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with services(tmp_path, INPUTS=str(inputs), WORKERS="2", TRAINER_THREADS="1") as running:
        cache = running.path("/caches") / "cache"
        running.start("scheduler")
        running.start("worker")
        running.start("capture")
        wait_until(lambda: len(list(cache.glob("receipts/0*.json"))) >= 3)
        assert running.stop("capture") == [130], running.log("capture")
        assert verify_cache(cache) != []
        running.healthy("worker")

        running.start("capture")
        running.start("trainer")
        assert running.processes["trainer"][0].wait() == 0, running.log("trainer")
        assert verify_cache(cache) == []
        AutoModelForCausalLM.from_pretrained(running.path("/runs") / "run" / "student")
        running.stop("worker")
        assert running.stop("scheduler") == [0]
