"""A tracker of the library's own integrations gets the losses, the profile and the manifest, offline."""

import dataclasses

import numpy as np

from rsstudy.common.settings import load_profile
from rsstudy.model.generate import Captioner
from rsstudy.model.nano import nano_model, nano_processor
from rsstudy.training.fit import fit
from rsstudy.training.loader import CaptionRows
from rsstudy.training.plan import TrainingPlan
from rsstudy.tuning.lora import Lora


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    captioner = Lora().attach(Captioner(nano_model(seed=0), nano_processor()))
    rows = CaptionRows(captioner, [np.full((224, 224, 3), 60 * i, np.uint8) for i in range(4)], [["a red field ."]] * 4)
    plan = TrainingPlan(lr=1e-3, epochs=2, batch_images=2, val_captions=0, track="tensorboard")
    history = fit(
        captioner,
        rows,
        rows,
        plan,
        about=dict(profile=dataclasses.asdict(load_profile("nano")), code="abc123"),
        logs=tmp_path,
    )
    (folder,) = tmp_path.glob("lora-seed0-lr0.001/runs/*")
    events = EventAccumulator(str(folder)).Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars("train/loss")], history["losses"], rtol=1e-6)
    said = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "abc123" in said and '"resamples"' in said and '"batch_images": 2' in said
