"""The demo's tables over seeds: their numbers, and what makes no table."""

import json

import pytest

from bench.atari_demo_table import main


def summary(seed, score, word):
    row = {"score": score, "by_game": {"catch": score + 1, "keep": score - 1}, "title": "Hub"}
    lead = {"method": "hub", "rival": "scratch", "value": 2.0, "low": 1.0, "high": 3.0}
    return {
        "seed": seed, "steps": 60, "episodes": 10, "sources": {"catch": 1, "keep": 2},
        "random": row | {"score": 0.5}, "methods": {"hub": row},
        "differences": [lead | {"said": word}],
        "weights": {"hub": {g: {"catch": 0.9, "keep": 0.1 * seed} for g in ("catch", "keep")}},
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    found = []
    for seed, score, word in ((0, 4.0, "ahead"), (1, 6.0, "level")):
        found.append(tmp_path / str(seed))
        found[-1].mkdir()
        (found[-1] / "summary.json").write_text(json.dumps(summary(seed, score, word)))
    return found


def test_the_tables_have_means_words_and_weights(folders, capsys):
    main([str(folder) for folder in folders])
    assert capsys.readouterr().out.splitlines() == [
        "|  | medley | catch | keep |",
        "| --- | ---: | ---: | ---: |",
        "| actions at random | 0.50 ± 0.00 | 6.00 ± 1.41 | 4.00 ± 1.41 |",
        "| Hub | 5.00 ± 1.41 | 6.00 ± 1.41 | 4.00 ± 1.41 |",
        "",
        "|  | seed 0 | seed 1 |",
        "| --- | ---: | ---: |",
        "| Hub against from scratch | +2.00 (+1.00 to +3.00): ahead | "
        "+2.00 (+1.00 to +3.00): level |",
        "",
        "|  | policy of catch | policy of keep |",
        "| --- | ---: | ---: |",
        "| Hub, episodes of catch | 0.90 / 0.90 | 0.00 / 0.10 |",
        "| Hub, episodes of keep | 0.90 / 0.90 | 0.00 / 0.10 |",
    ]


def test_what_makes_no_table_is_refused(folders, tmp_path):
    with pytest.raises(SystemExit, match="holds no finished demo"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="the same seed"):
        main([str(folders[0])] * 2)
    other = json.loads((folders[1] / "summary.json").read_text()) | {"steps": 61}
    (folders[1] / "summary.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="of different steps"):
        main([str(folder) for folder in folders])
