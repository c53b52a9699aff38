"""Post-processing: each step on shapes that were drawn by hand, what is chosen on held-out cases, and what predict makes of it."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from medssm.errors import UserError
from medssm.scratch import Store
from medssm.segment.images import read_label
from medssm.segment.postprocess import POSTPROCESSING, Held, choose, described, load, process, save
from medssm.segment.predict import predict
from medssm.segment.volumetry import read_volumes
from tests.segment.synthetic import volume, write

CLASSES = {"a": ((1,), 1), "b": ((2,), 2)}
REGIONS = {"whole": ((1, 2), 1), "core": ((2,), 2)}


def processed(labels, steps, structures, voxel_ml):
    """A copy of a label map after the steps."""
    done = labels.copy()
    process(Store.of(torch.from_numpy(done)), steps, structures, voxel_ml)
    return done


STEPS = ("fill_holes", "largest_component", "smallest_ml")


def map_of(**boxes) -> np.ndarray:
    """A label map of 12 x 10 x 8 voxels; `one_2=(slice, slice, slice)` writes the value 2, later ones over earlier ones."""
    labels = np.zeros((12, 10, 8), np.uint8)
    for name, box in boxes.items():
        labels[box] = int(name.rpartition("_")[2])
    return labels


BODY = (slice(1, 7), slice(1, 7), slice(1, 7))
HOLE = (slice(3, 4), slice(3, 4), slice(3, 4))
SPOT = (slice(9, 11), slice(8, 9), slice(2, 3))  # two voxels


def test_the_largest_component_is_kept():
    labels = map_of(body_1=BODY, spot_1=SPOT, other_2=(slice(9, 10), slice(1, 2), slice(1, 2)))
    done = processed(labels, {"a": {"largest_component": True}}, CLASSES, 1.0)
    wanted = map_of(body_1=BODY, other_2=(slice(9, 10), slice(1, 2), slice(1, 2)))
    np.testing.assert_array_equal(done, wanted)


def test_parts_that_touch_at_a_corner_are_one():
    labels = map_of(one_1=(slice(1, 3),) * 3, corner_1=(slice(3, 4),) * 3)
    np.testing.assert_array_equal(processed(labels, {"a": {"largest_component": True}}, CLASSES, 1.0), labels)


def test_holes_are_filled_with_background_alone():
    hole, closed = map_of(body_1=BODY, hole_0=HOLE), map_of(body_1=BODY)
    np.testing.assert_array_equal(processed(hole, {"a": {"fill_holes": True}}, CLASSES, 1.0), closed)
    core = map_of(body_1=BODY, core_2=HOLE)
    np.testing.assert_array_equal(processed(core, {"a": {"fill_holes": True}}, CLASSES, 1.0), core)
    tunnel = map_of(body_1=BODY, tunnel_0=(slice(3, 4), slice(3, 4), slice(0, 8)))
    np.testing.assert_array_equal(processed(tunnel, {"a": {"fill_holes": True}}, CLASSES, 1.0), tunnel)
    plane = map_of(body_1=BODY, hole_0=HOLE)[:, :, 3:4]  # in a plane it is a hole in two dimensions
    np.testing.assert_array_equal(processed(plane, {"a": {"fill_holes": True}}, CLASSES, 1.0), closed[:, :, 3:4])


def test_small_parts_go_by_millilitres():
    labels = map_of(body_1=BODY, spot_1=SPOT)
    for size, kept in ((0.016, True), (0.0161, False)):  # two voxels of 8 mm^3
        done = processed(labels, {"a": {"smallest_ml": size}}, CLASSES, 0.008)
        assert (done == labels).all() == kept and (done[BODY] == 1).all() and done.sum() == 216 + 2 * kept
    assert not processed(labels, {"a": {"smallest_ml": 9.0, "largest_component": True}}, CLASSES, 0.008).any()


def test_a_region_goes_with_all_in_it_and_is_filled_with_its_own_value():
    labels = map_of(body_1=BODY, core_2=HOLE, hole_0=(slice(5, 6),) * 3, spot_1=SPOT, spot_2=(slice(9, 10), slice(8, 9), slice(2, 3)))
    done = processed(labels, {"whole": {"largest_component": True, "fill_holes": True}}, REGIONS, 1.0)
    np.testing.assert_array_equal(done, map_of(body_1=BODY, core_2=HOLE))


def test_a_structure_that_is_not_there_stays_so():
    empty = map_of()
    np.testing.assert_array_equal(processed(empty, {name: dict.fromkeys(STEPS, 1.0) for name in CLASSES}, CLASSES, 1.0), empty)


# -- what is chosen


def held(*pairs, classes=3) -> list[Held]:
    return [Held(found.astype(np.int16), truth.astype(np.int16), 0.001, classes) for found, truth in pairs]


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def test_a_step_is_kept_where_it_raises_its_class():
    """The spot of class 1 is wrong and goes; class 2 has two parts, and both are right."""
    two = {"p_2": (slice(9, 10), slice(1, 4), slice(1, 4)), "q_2": (slice(9, 10), slice(6, 7), slice(6, 7))}
    truth = map_of(body_1=BODY, **two)
    found = map_of(body_1=BODY, spot_1=SPOT, **two)
    steps, gain = choose(held((found, truth)), CLASSES)
    assert steps == {"a": {"largest_component": True}, "b": {}}
    assert gain["a"] == [pytest.approx(dice(found == 1, truth == 1), abs=1e-6), 1.0] and gain["b"] == [1.0, 1.0]


def test_two_parts_of_which_a_third_is_wrong_need_a_size():
    truth = map_of(body_1=BODY, other_1=(slice(8, 11), slice(1, 7), slice(1, 7)))  # 216 and 108 voxels of 1 mm^3
    found = map_of(body_1=BODY, other_1=(slice(8, 11), slice(1, 7), slice(1, 7)), spot_1=SPOT)
    steps, _ = choose(held((found, truth)), CLASSES)
    assert steps["a"] == {"smallest_ml": 0.0324}  # a tenth of the smallest reference; a half of it would take the second part too


def test_a_step_has_to_help_over_all_cases():
    lone = map_of(spot_1=SPOT)
    both = map_of(body_1=BODY, spot_1=SPOT)
    steps, gain = choose(held((both, both), (both, map_of(body_1=BODY))), CLASSES)
    assert steps["a"] == {} and gain["a"][0] == gain["a"][1]  # what one case wins the other one loses
    steps, gain = choose(held((lone, map_of()), (map_of(body_1=BODY), map_of(body_1=BODY))), CLASSES)
    assert steps["a"] == {"smallest_ml": 0.108} and gain["a"] == [0.5, 1.0]  # a spot in a case without the class


def test_holes_and_parts_are_chosen_together_and_the_next_class_sees_them():
    truth, found = map_of(body_1=BODY), map_of(body_1=BODY, hole_0=HOLE, spot_1=SPOT)
    steps, gain = choose(held((found, truth)), CLASSES)
    assert steps["a"] == {"fill_holes": True, "largest_component": True} and gain["a"][1] == 1.0
    np.testing.assert_array_equal(processed(found, steps, CLASSES, 0.001), truth)


def test_a_region_does_not_take_another_one_away():
    """Without its second part the whole is better by a little, and the core, which lies in that part, is lost."""
    part = (slice(9, 11), slice(1, 3), slice(1, 3))
    truth, found = map_of(body_1=BODY, part_2=part), map_of(body_1=BODY, part_1=(slice(8, 12), slice(0, 4), slice(0, 4)), core_2=part)
    assert dice(map_of(body_1=BODY) > 0, truth > 0) > dice(found > 0, truth > 0)
    assert choose(held((found, truth)), REGIONS)[0] == {"whole": {}, "core": {}}


def test_a_filled_hole_belongs_to_every_region_of_its_value():
    """The hole of the first region is filled with the value 1, and the second region sees it: its own voxel is then not its largest part."""
    shell, regions = {"body_2": BODY}, {"first": ((1, 2), 1), "second": ((1, 3), 3)}
    truth = map_of(**shell, filled_1=(slice(3, 5),) * 3)
    found = map_of(**shell, hole_0=(slice(3, 5),) * 3, lone_3=(slice(10, 11), slice(8, 9), slice(2, 3)))
    steps, gain = choose(held((found, truth), classes=4), regions)
    assert steps == {"first": {"fill_holes": True}, "second": {"largest_component": True}} and gain["second"] == [0.0, 1.0]
    np.testing.assert_array_equal(processed(found, steps, regions, 0.001), truth)


def test_voxels_without_a_label_do_not_count():
    truth, found = map_of(body_1=BODY).astype(np.int16), map_of(body_1=BODY, spot_1=SPOT)
    truth[SPOT] = -1
    steps, gain = choose(held((found, truth)), CLASSES)
    assert steps == {"a": {}, "b": {}} and gain["a"] == [1.0, 1.0]


def test_processes_decide_together():
    """Each has one case; the sums over both say what is chosen."""
    both, body = map_of(body_1=BODY, spot_1=SPOT), map_of(body_1=BODY)
    pairs, calls = [(both, both), (both, body), (both, body)], []
    whole = choose(held(*pairs), CLASSES, lambda values, how: calls.append((how, values.copy())) or values)
    parts = [[], []]
    for part, chosen in ((0, pairs[:1]), (1, pairs[1:])):
        totals = iter(calls)
        found = choose(held(*chosen), CLASSES, lambda values, how, totals=totals, part=part: parts[part].append(values.copy()) or next(totals)[1])
        assert found[0] == whole[0]
    for (how, total), one, other in zip(calls, *parts, strict=True):
        np.testing.assert_allclose(total, one + other if how == "sum" else np.minimum(one, other))


# -- the file, and predict


def test_folds_agree_on_what_all_of_them_chose(tmp_path):
    for name, steps in (
        ("x", {"a": {"fill_holes": True, "smallest_ml": 0.5}, "b": {}}),
        ("y", {"a": {"smallest_ml": 0.2, "largest_component": True}, "b": {}}),
    ):
        (tmp_path / name).mkdir()
        save(tmp_path / name / POSTPROCESSING, steps, {"a": [0.5, 0.75], "b": [1, 1]}, ({}, {}))
    folders = [tmp_path / "x", tmp_path / "y"]
    assert load(folders, ["a", "b"]) == {"a": {"smallest_ml": 0.2}, "b": {}}
    assert described(load(folders[:1], ["a", "b"])) == "a holes filled and no part below 0.5 ml"
    assert described(load([*folders, tmp_path], ["a", "b"])) == "none"  # a training without held-out cases chose nothing
    assert json.loads((tmp_path / "x" / POSTPROCESSING).read_text())["validation_dice"]["a"] == {"before": 0.5, "after": 0.75}
    assert described(load(folders[:1], ["a", "b"], "best")) == "none"
    save(tmp_path / "x" / POSTPROCESSING, {"a": {"fill_holes": True}}, {})
    assert described(load(folders[:1], ["a", "b"], "best")) == "a holes filled"


@pytest.mark.parametrize("table", [[], {}, {"steps": {"c": {}}}, {"steps": {"a": {"smooth": 1}}}, {"steps": {"a": 3}}])
def test_a_file_of_another_content_is_named(tmp_path, table):
    (tmp_path / POSTPROCESSING).write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"postprocessing\.json: expected steps fill_holes, largest_component, smallest_ml for some of a, b"):
        load([tmp_path], ["a", "b"])


def test_predict_does_what_training_chose(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "fold_0", run)
    table = json.loads((run / POSTPROCESSING).read_text())
    assert table["steps"].keys() == table["best"]["validation_dice"].keys() == {"ball", "box"}
    image, _ = volume(7)
    image[30:36, 30:34, 2:8] = 180.0  # a second, small ball
    scan = write(tmp_path / "a.nii.gz", image[..., 0], np.diag([2, 1, 1, 1]))
    steps = {"ball": {"largest_component": True}, "box": {"smallest_ml": 99.0}}
    save(run / POSTPROCESSING, steps, {}, ({"ball": {"fill_holes": True}}, {}))
    predict(run, scan, tmp_path / "done", device="cpu")
    assert "post-processing: ball largest component, box no part below 99 ml" in capsys.readouterr().err
    predict(run, scan, tmp_path / "best", device="cpu", weights="best")
    assert "post-processing: ball holes filled\n" in capsys.readouterr().err
    predict(run, scan, tmp_path / "plain", device="cpu", postprocessing="none")
    assert "post-processing" not in capsys.readouterr().err
    done, plain = (read_label(tmp_path / name / "a.nii.gz")[0] for name in ("done", "plain"))
    np.testing.assert_array_equal(done, processed(plain, steps, {"ball": ((1,), 1), "box": ((2,), 2)}, 0.002))
    assert (plain[31:35, 31:33, 3:7] == 1).any() and not (done[31:35, 31:33, 3:7] == 1).any() and (plain == 2).any() and not (done == 2).any()
    assert read_volumes(tmp_path / "done" / "volumes.csv")["a"]["ball"]["voxels"] == (done == 1).sum()
    assert nib.load(tmp_path / "done" / "a.nii.gz").get_data_dtype() == np.uint8
    with pytest.raises(UserError, match="postprocessing: expected auto or none, got 'all'"):
        predict(run, scan, tmp_path / "x", device="cpu", quiet=True, postprocessing="all")
