"""The comparison of encoders: what is compared, and a whole run of it on a model of one block."""

import csv

import pytest

from ssast.benchmarks import encoder_tokens


def test_variants_differ_in_what_the_encoder_reads_alone():
    configs = {
        name: encoder_tokens.config_of("base", 8, settings, [])
        for name, settings in encoder_tokens.variants("base").items()
    }
    assert [config.architecture.head_width for config in configs.values()] == [768, 768, 384]
    assert [config.architecture.has_decoder for config in configs.values()] == [False, True, True]
    sections = [config.model_dump(exclude={"model"}) for config in configs.values()]
    assert sections[0] == sections[1] == sections[2] and not configs["all"].bf16


def test_few_turns_say_nothing(capsys):
    with pytest.raises(SystemExit):
        encoder_tokens.main(["--turns", "2"])
    assert "--turns 2: at least 3" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_a_run(tmp_path):
    small = ["model.depth=1", "model.input_frames=64", "mask.num_masked=20"]
    options = ["--sizes", "tiny", "--batch", "1", "--turns", "3", "--out", str(tmp_path / "rows.csv")]
    assert encoder_tokens.main([*options, *small]) == 0
    with open(tmp_path / "rows.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["decoder"] for row in rows] == ["", "2 x 192", "2 x 128"] and rows[0]["times"] == "1.0"
    for row in rows:
        low, times, high = (float(row[name]) for name in ("times_low", "times", "times_high"))
        assert low <= times <= high and float(row["clips_per_s"]) > 0 and 0 < float(row["peak_gib"]) < 4
