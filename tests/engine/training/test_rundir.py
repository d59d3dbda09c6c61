"""What a run folder remembers of the sound that its steps have heard."""

import json

import numpy as np
import pytest

from ssast.engine.config import load_config
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import Dataset
from ssast.engine.data.resample import SOUND_VERSION
from ssast.engine.training.rundir import sound_version


def dataset(*rates: int) -> Dataset:
    count = len(rates)
    texts = [[str(number) for number in range(count)]] * 4
    ones = np.ones(count, dtype=np.int64)
    clips = Clips(*texts, ones, np.array(rates, dtype=np.int32), ones, ones, ones)
    return Dataset(clips, clips.subset(np.zeros(0, dtype=np.int64)), [], 0.0, 1.0, [count])


@pytest.mark.parametrize(
    ("data_json", "rates", "version", "warned"),
    [
        (None, (44_100,), SOUND_VERSION, False),  # begins now
        ({}, (44_100, 16_000, 48_000), 1, True),
        ({"sound": 1}, (16_001,), 1, True),  # warned of before: other steps of the run have heard it all the same
        ({"sound": SOUND_VERSION}, (44_100,), SOUND_VERSION, False),
        ({}, (8_000, 16_000), SOUND_VERSION, False),  # nothing aliased
    ],
)
def test_runs_that_heard_aliases_say_so(tmp_path, capsys, data_json, rates, version, warned):
    config = load_config("demo", [f"run.folder={tmp_path}", "run.name=run"])
    folder = tmp_path / "run"
    folder.mkdir()
    if data_json is not None:
        (folder / "data.json").write_text(json.dumps(data_json))
        (folder / "metrics.jsonl").write_text("{}\n")
    assert sound_version(config, dataset(*rates)) == version
    above = sum(rate > 16_000 for rate in rates)
    assert (f"heard aliases in {above} clips" in capsys.readouterr().out) == warned
