"""Two processes of `accelerate launch` learn what one learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RUN = Path(__file__).with_name("distributed_run.py")


def launch(folder, out, batch_images, micro_images, *options):
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_machines",
        "1",
        *options,
        str(RUN),
        str(folder),
        out,
        str(batch_images),
        str(micro_images),
    ]
    said = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"),
    )
    assert said.returncode == 0, said.stderr[-3000:]
    return json.loads((folder / f"{out}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return folder, launch(folder, "one", 3, 0, "--cpu", "--num_processes", "1")


def test_two_processes_learn_what_one_learns(one):
    folder, alone = one
    both = launch(
        folder, "two", 3, 1, "--cpu", "--num_processes", "2"
    )  # the last step of an epoch has one image: a process without a row
    assert len(alone["losses"]) == 6
    np.testing.assert_allclose(both["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(both["val"], alone["val"], rtol=1e-5)
    for name, weight in alone["weights"].items():
        np.testing.assert_allclose(both["weights"][name], weight, rtol=1e-3, atol=1e-5)
    assert (folder / "fills.txt").read_text().split() == ["filled"]  # the vision cache, once for all processes


def test_sharded_over_two_processes(one):
    folder, alone = one
    config = folder / "fsdp.yaml"
    config.write_text(
        """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_processes: 2
num_machines: 1
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: GemmaDecoderLayer
"""
    )
    shards = launch(folder, "shards", 3, 1, "--config_file", str(config))
    np.testing.assert_allclose(shards["losses"], alone["losses"], rtol=1e-5)
    for name, weight in alone["weights"].items():
        np.testing.assert_allclose(shards["weights"][name], weight, rtol=1e-3, atol=1e-5)
