"""bench.shelf_add: a model comes back to a hub that has lost all of its kind."""

from support.shelves import make_hub, make_shelf

from bench import shelf_add


def test_the_model_comes_back_and_others_stay(tmp_path, capsys):
    shelf = make_shelf(tmp_path / "shelf", sizes=(120, 120, 120))
    make_hub(shelf, range(4), k=1)
    shelf_add.main([str(shelf.folder), "model3", "model2"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    for row, label in zip(rows, ("model3", "model2"), strict=True):
        name, _, others, before, after, gets, moved = (c.strip() for c in row.split("|")[1:-1])
        assert (name, others, moved) == (label, "3 of 4", "0")
        assert float(after) > float(before)
        assert 0 < float(gets.removesuffix(" %")) < 100
