"""medssm predict and evaluate for classifiers: the CSV, what is never written over, and figures against labels."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

from medssm import cli
from medssm.classify.evaluate import evaluate
from medssm.classify.figures import figures
from medssm.classify.predict import predict
from medssm.errors import UserError
from medssm.segment.predict import predict as segment
from tests.classify.pictures import picture

QUIET = {"device": "cpu", "quiet": True}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_held_out_images_are_classified(runs, cells, tmp_path):
    out = tmp_path / "found.csv"
    assert cli.main(["predict", str(runs / "fold_0"), str(runs / "fold_0" / "cases.json"), str(out), "--section", "validation", "--quiet"]) == 0
    found = rows(out)
    assert list(found[0]) == ["path", "group", "label", "p_bar", "p_dark", "p_disc"] and len(found) == 12
    for row in found:
        values = [float(row[f"p_{name}"]) for name in ("bar", "dark", "disc")]
        assert sum(values) == pytest.approx(1, abs=1e-5) and row["label"] == ("bar", "dark", "disc")[int(np.argmax(values))]
    assert cli.main(["evaluate", str(out), str(cells), "--json"]) == 0


def test_the_temperature_of_the_training_is_used(runs, cells, tmp_path):
    own = json.loads((runs / "fold_0" / "calibration.json").read_text())["temperature"]["last"]
    image = next((cells / "bar").glob("*.png"))
    plain = predict(runs / "fold_0", image, tmp_path / "a.csv", temperature=1.0, **QUIET)["images"][str(image)]["probabilities"]
    found = predict(runs / "fold_0", image, tmp_path / "a.csv", **QUIET)
    assert found["temperature"] == [own] and own != 1
    logits = np.log(list(plain.values())) / own
    np.testing.assert_allclose(list(found["images"][str(image)]["probabilities"].values()), np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def test_folds_are_averaged(runs, cells, tmp_path):
    image = next((cells / "bar").glob("*.png"))
    one, other, both = (
        predict(run, image, tmp_path / "a.csv", **QUIET)["images"][str(image)]["probabilities"] for run in (runs / "fold_0", runs / "fold_1", runs)
    )
    for name in one:
        assert both[name] == pytest.approx((one[name] + other[name]) / 2, abs=1e-6)
    assert predict(runs / "fold_0", image, tmp_path / "b.csv", more_runs=[runs / "fold_1"], **QUIET)["images"][str(image)]["probabilities"] == both


def test_any_batch_and_the_best_weights(runs, cells, tmp_path):
    results = [predict(runs / "fold_0", cells / "disc", tmp_path / "a.csv", batch=batch, **QUIET)["images"] for batch in (1, 5, 32)]
    for path in results[0]:
        for result in results[1:]:
            assert result[path]["probabilities"] == pytest.approx(results[0][path]["probabilities"], abs=1e-5)
    predict(runs / "fold_0", cells / "disc", tmp_path / "b.csv", weights="best", **QUIET)


def test_inputs_of_every_kind(runs, cells, tmp_path):
    names = sorted(f"{kind}/p0_0.png" for kind in ("bar", "dark", "disc"))
    (tmp_path / "list.txt").write_text("".join(f"{cells / name}\n" for name in names))
    with open(tmp_path / "list.csv", "w") as file:
        file.write("scan,patient\n" + "".join(f"{cells / name},p0\n" for name in names))
    kinds = ([cells / name for name in names], tmp_path / "list.txt", tmp_path / "list.csv", [cells / "bar" / "p0_0.png", tmp_path / "list.csv"])
    for inputs in kinds:
        predict(runs / "fold_0", inputs, tmp_path / "out.csv", path_column="scan", **QUIET)
        assert [os.path.realpath(row["path"]) for row in rows(tmp_path / "out.csv")] == [os.path.realpath(cells / name) for name in names]
    assert {row["group"] for row in rows(tmp_path / "out.csv")} == {"p0"}
    predict(runs / "fold_0", cells, tmp_path / "out.csv", **QUIET)
    assert len(rows(tmp_path / "out.csv")) == 48


def test_one_bad_image_does_not_stop_the_others(runs, tmp_path, capsys):
    Image.fromarray(picture(0, 99)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    assert cli.main(["predict", str(runs / "fold_0"), str(tmp_path), str(tmp_path / "out" / "a.csv"), "--quiet"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"medssm predict (classify): {tmp_path / 'bad.png'}: ") and len(shown.splitlines()) == 1
    assert [row["path"] for row in rows(tmp_path / "out" / "a.csv")] == [str(tmp_path / "good.png")]
    with pytest.raises(UserError, match=r"bad\.png"):
        predict(runs / "fold_0", tmp_path / "bad.png", tmp_path / "b.csv", **QUIET)


def test_no_file_is_lost(runs, cells, tmp_path):
    image, other = next((cells / "bar").glob("*.png")), tmp_path / "mine.csv"
    other.write_text("my,table\n1,2\n")
    with pytest.raises(UserError, match="is there already, and this command did not write it: name another one, or pass --overwrite"):
        predict(runs / "fold_0", image, other, **QUIET)
    listed = tmp_path / "list.csv"
    listed.write_text(f"file\n{image}\n")
    with pytest.raises(UserError, match="is a file that is read; name another one"):
        predict(runs / "fold_0", listed, listed, overwrite=True, **QUIET)
    assert other.read_text() == "my,table\n1,2\n" and listed.read_text() == f"file\n{image}\n"
    for _ in range(2):  # its own one without a word
        predict(runs / "fold_0", image, tmp_path / "a.csv", **QUIET)
    predict(runs / "fold_0", image, other, overwrite=True, **QUIET)
    assert rows(other)[0]["path"] == str(image)


def test_errors_are_one_clear_line(runs, cells, tmp_path, capsys):
    def message(*arguments, **kwargs):
        with pytest.raises(UserError) as error:
            predict(*arguments, **QUIET, **kwargs)
        return str(error.value)

    image = next((cells / "bar").glob("*.png"))
    assert message(runs, image, tmp_path / "labels") == f"out: expected a file that ends in .csv, got {tmp_path / 'labels'}"
    assert message(runs, tmp_path / "none.png", tmp_path / "a.csv").endswith("none.png: no such file or folder")
    assert message(runs, image, tmp_path / "a.csv", temperature=0.0) == "temperature: expected more than 0, got 0.0"
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "fitted.json").write_text("{}")
    (tmp_path / "masks" / "model.safetensors").write_bytes(b"")
    assert "where a classifier is expected" in message(tmp_path / "masks", image, tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"of a classifier \(medssm train --task classify\), where a network that segments is expected"):
        segment(runs / "fold_0", image, tmp_path / "a.png", **QUIET)
    assert cli.main(["predict", str(runs), str(image), str(tmp_path / "a.csv"), "--overlap", "0.5"]) == 2
    assert capsys.readouterr().err.startswith("medssm predict (classify): --overlap: no such option")
    Image.fromarray(picture(0, 0)[..., 0]).save(tmp_path / "grey.png")
    predict(runs / "fold_0", tmp_path / "grey.png", tmp_path / "a.csv", **QUIET)  # grey is a colour
    (tmp_path / "damaged").mkdir()
    for file in (runs / "fold_0").iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "damaged" / "calibration.json").write_text('{"temperature": {"last": "x"}}')
    assert "calibration.json: temperature: expected a number for the last weights" in message(tmp_path / "damaged", image, tmp_path / "a.csv")


def test_evaluate_scores_a_csv(runs, cells, tmp_path):
    out = tmp_path / "a.csv"
    predict(runs / "fold_0", cells / "table.csv", out, **QUIET)
    result = evaluate(out, cells / "table.csv", json_file=tmp_path / "a.json", quiet=True)
    found = rows(out)
    truth = [os.path.basename(os.path.dirname(row["path"])) for row in found]
    names = ["bar", "dark", "disc"]
    table = np.array([[float(row[f"p_{name}"]) for name in names] for row in found])
    wanted = figures([names.index(name) for name in truth], table, [row["group"] for row in found])
    assert result["figures"] == wanted and result["images"] == 48 and result["groups"] == 8 and result["unused"] == []
    assert json.loads((tmp_path / "a.json").read_text())["confusion"] == result["confusion"]
    predict(runs / "fold_0", cells / "disc", out, **QUIET)
    by_folder = evaluate(out, cells, group=r"(p\d)", quiet=True)
    assert by_folder["images"] == 16 and len(by_folder["unused"]) == 32 and set(by_folder["recall"]) == {"disc"}


def test_bad_tables_to_evaluate_are_one_clear_line(runs, cells, tmp_path):
    def message(*arguments, **kwargs):
        with pytest.raises(UserError) as error:
            evaluate(*arguments, quiet=True, **kwargs)
        return str(error.value)

    out = tmp_path / "a.csv"
    predict(runs / "fold_0", cells / "table.csv", out, **QUIET)
    assert "expected the columns path, group, label, p_CLASS" in message(cells / "table.csv", cells / "table.csv")
    other = tmp_path / "labels.csv"
    other.write_text(f"file,class\n{cells / 'bar/p0_0.png'},bar\n{cells / 'bar/p0_1.png'},foo\n")
    assert "has the label foo, which is none of the classes bar, dark, disc" in message(out, other)
    predict(runs / "fold_0", cells / "dark", out, **QUIET)
    assert f"{other}: no label for {cells / 'dark/p0_0.png'}" in message(out, other)
    (tmp_path / "mine.json").write_text("{}")
    assert "pass --overwrite" in message(out, cells, json_file=tmp_path / "mine.json")
    out.write_text("path,group,label,p_a,p_b\nx.png,,a,0.9,0.9\n")
    assert "line 2: expected probabilities that sum to 1, got 0.9, 0.9" in message(out, cells)
