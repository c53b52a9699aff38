"""DICOM in: series sorted by position, in place as SimpleITK has them, refused by name where they are no volume. DICOM-SEG out, read by others."""

import os

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, RLELossless, generate_uid

from medssm.errors import UserError
from medssm.segment.cases import cases_in
from medssm.segment.images import dicom_seg, is_made_here, open_image, read_image, read_label, write_image
from medssm.segment.images.dicom import is_dicom
from medssm.segment.inputs import cases_of
from tests.segment.dicom import ACROSS, DOWN, FIRST, NORMAL, PIXEL, STEP, series, slice_of, study
from tests.segment.synthetic import write
from tests.segment.test_formats import same_places

DATA = np.random.default_rng(0).integers(-500, 500, (4, 6, 5)).astype(np.int16)  # z, rows, columns
CLASSES = {"background": 0, "liver": 10, "tumour": 300}
LABELS = np.array([0, 10, 300])[np.random.default_rng(1).integers(0, 3, (5, 6, 4))]


def itk_series(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_a_series_is_read_in_place_and_in_hounsfield_units(tmp_path):
    found, file = read_image([series(tmp_path / "ct", DATA)], 1)
    np.testing.assert_array_equal(found[0], DATA.T * 2.0 - 1000)
    assert (file.format, file.shape, file.notes) == ("DICOM", (5, 6, 4), ())
    np.testing.assert_allclose(file.spacing, [PIXEL[1], PIXEL[0], STEP])  # the step, not the thickness of a slice
    other = itk_series(tmp_path / "ct")
    same_places(file, other)
    np.testing.assert_array_equal(found[0], sitk.GetArrayFromImage(other).T)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: {} if i not in (2, 3) else None, r"some 2 slice\(s\) missing, 4 there: 6\.00 mm from IM007 to IM028, where .* 2\.00 mm apart"),
        (lambda i: {} if i != 3 else None, r"some 1 slice\(s\) missing, 5 there: 4\.00 mm from IM014 to IM028, where .* 2\.00 mm apart"),
        (lambda i: {"index": min(i, 4)}, r"1 of 6 slices lie where another one lies, as IM028 and IM035 at 38\.00 mm: several times, echoes"),
        (lambda i: {"index": i + 0.3 * (i == 3)}, r"slices at uneven steps, from 1\.400 to 2\.600 mm, as at IM021"),
        (lambda i: {"index": i + 0.03 * (i == 3)}, r"slices at uneven steps, from 1\.940 to 2\.060 mm, as at IM021"),
        (
            lambda i: {"ImagePositionPatient": (FIRST + i * STEP * NORMAL + i * 0.5 * DOWN).tolist()},
            r"slices shifted against each other by a gantry tilt of 14\.0 degrees",
        ),
        (lambda i: {"PhotometricInterpretation": "RGB"} if i else {}, r"expected grey values, got RGB \(5\), MONOCHROME2 \(1\)"),
        (lambda i: {"PhotometricInterpretation": "MONOCHROME1"} if i else {}, r"MONOCHROME1 and MONOCHROME2 in one series"),
        (lambda i: {"SeriesInstanceUID": "1.2.3"} if i > 3 else {}, r"2 series in one folder: .*\(CT, 4 file\(s\), as IM000\), 1\.2\.3 \(CT, 2"),
        (lambda i: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]} if i == 2 else {}, r"slices of more than one orientation: .*\(5\), .*\(1\)"),
        (lambda i: {"PixelSpacing": [1, 1]} if i == 2 else {}, r"slices of more than one pixel size: 0\.7 x 0\.5 \(5\), 1 x 1 \(1\)"),
        (lambda i: {"Rows": 3, "Columns": 10} if i == 2 else {}, r"slices of more than one size: 5 x 6 \(5\), 10 x 3 \(1\)"),
        (lambda i: {"ImagePositionPatient": None} if i == 2 else {}, r"1 of 6 slices have no position, as IM014"),
    ],
    ids=[
        "missing",
        "one missing",
        "double",
        "uneven",
        "a little uneven",
        "tilt",
        "colours",
        "monochrome",
        "series",
        "orientation",
        "pixels",
        "size",
        "position",
    ],
)
def test_what_is_no_volume_is_refused_with_numbers(tmp_path, edit, message):
    folder = series(tmp_path / "ct", np.concatenate([DATA, DATA[:2]]), edit)
    with pytest.raises(UserError, match=message) as error:
        open_image(folder)
    assert str(error.value).startswith(f"{folder}: ")


def turned(degrees):
    """Directions turned in the plane of the slices."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return [*(c * ACROSS + s * DOWN), *(c * DOWN - s * ACROSS)]


@pytest.mark.parametrize("start", [0.0, 0.11, 0.2])
def test_directions_and_pixel_sizes_may_be_rounded_but_not_differ(tmp_path, start):
    """The same answer wherever the numbers lie: none is told from another by a digit at which both are rounded."""

    def written(degrees, larger):
        return lambda i: {"ImageOrientationPatient": turned(start + degrees * (i == 2)), "PixelSpacing": [0.70005 * (1 + larger * (i == 2)), 0.5]}

    assert open_image(series(tmp_path / "rounded", DATA, written(0.02, 3e-4))).shape == DATA.T.shape
    with pytest.raises(UserError, match=r"slices of more than one orientation: .* \(3\), .* \(1\)"):
        open_image(series(tmp_path / "turned", DATA, written(0.2, 0)))
    with pytest.raises(UserError, match=r"slices of more than one pixel size: 0.70005 x 0.5 \(3\), 0.70145 x 0.5 \(1\)"):
        open_image(series(tmp_path / "larger", DATA, written(0, 2e-3)))


@pytest.mark.parametrize("name", ["CT_small", "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_jp2klossless", "JPGExtended", "693_J2KI"])
def test_scanners_files_are_read_as_itk_reads_them(name):
    """Files of scanners and other programs that pydicom carries; SimpleITK reads them by GDCM."""
    path = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
    if path is None:
        pytest.skip(f"this pydicom carries no {name}.dcm")
    (found, file), other = read_image([path]), sitk.ReadImage(path)
    np.testing.assert_array_equal(found[0].T, sitk.GetArrayFromImage(other))
    same_places(file, other)


@pytest.mark.parametrize("down", [(0.0, 0, -1), (0.6, 0, -0.8)])
def test_a_series_along_any_axis_is_sorted_along_it(tmp_path, down):
    """Sagittal and oblique slices, whose places differ along the patient's left and right."""
    across, down = np.array([0.0, 1, 0]), np.array(down)
    normal = np.cross(across, down)
    tags = {"ImageOrientationPatient": [*across.tolist(), *down.tolist()]}
    folder = series(tmp_path / "mr", DATA, lambda i: {"ImagePositionPatient": (FIRST + i * STEP * normal).tolist(), **tags})
    found, file = read_image([folder])
    np.testing.assert_array_equal(found[0], DATA.T * 2.0 - 1000)
    same_places(file, itk_series(folder))


def test_places_may_be_rounded(tmp_path):
    """To a hundredth of a millimetre, of few thin slices: more than a tenth of a degree, and no tilt."""
    folder = series(
        tmp_path / "ct", DATA[:2], lambda i: {"index": i / 4, "ImagePositionPatient": (FIRST + i * 0.5 * NORMAL + i * 0.01 * DOWN).tolist()}
    )
    assert open_image(folder).shape == (5, 6, 2)


def test_slices_may_be_as_close_as_a_microscope_has_them(tmp_path):
    folder = series(tmp_path / "ct", DATA, lambda i: {"index": i / 100, "PixelSpacing": [0.02, 0.02]})
    np.testing.assert_allclose(open_image(folder).spacing, [0.02, 0.02, 0.02])


def test_each_slice_has_its_own_slope(tmp_path):
    """As in PET."""
    folder = series(tmp_path / "pet", DATA, lambda i: {"RescaleSlope": 1.0 + i, "RescaleIntercept": 0.0})
    np.testing.assert_array_equal(read_image([folder])[0][0], DATA.T * (1.0 + np.arange(4)))


def test_a_series_is_read_anew_where_a_file_changed(tmp_path):
    folder = series(tmp_path / "ct", DATA)
    before = open_image(folder)
    assert open_image(folder) is before
    os.utime(folder / "IM000", ns=(0, 0))  # written anew, with the same size
    assert open_image(folder) is not before
    (folder / "IM000").unlink()
    assert open_image(folder).shape == (5, 6, 3)


def test_a_slice_that_cannot_be_read_is_named(tmp_path):
    """At the end of a series nothing else would tell that it is missing."""
    folder = series(tmp_path / "ct", DATA)
    (folder / "IM021").rename(tmp_path / "last")
    (folder / "IM021").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"IM021: cannot be read \(No such file or directory\)"):
        open_image(folder)
    (folder / "IM021").unlink()
    (folder / "IM021").write_bytes(b"")
    with pytest.raises(UserError, match=r"IM021: an empty file beside the slices of a series, as of a copy that broke off"):
        open_image(folder)
    (folder / "IM021").write_bytes((tmp_path / "last").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"IM021: truncated or corrupt"):
        read_image([folder])


def test_mosaics_are_refused(tmp_path):
    folder = series(tmp_path / "fmri", DATA, lambda i: {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]})
    with pytest.raises(UserError, match=r"4 mosaic\(s\) of slices in one picture, as IM000: convert them to NIfTI first"):
        open_image(folder)


def test_a_folder_without_an_image(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="expected an image file, got a folder without DICOM in it"):
        open_image(tmp_path)


def test_other_objects_beside_a_series_are_left_out_and_said(tmp_path):
    folder = series(tmp_path / "ct", DATA)
    report = slice_of(DATA[0], 0, study(), Rows=None, Columns=None, PixelData=None)
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    write_image(folder / "labels.dcm", LABELS, open_image(folder), CLASSES)
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    file = open_image(folder)
    assert file.shape == (5, 6, 4) and file.notes == ("2 DICOM file(s) beside the series hold no image",)


def test_a_dose_beside_a_series_is_no_image(tmp_path):
    folder = series(tmp_path / "ct", DATA)
    slice_of(DATA[0], 0, study(), SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2").save_as(folder / "dose.dcm", enforce_file_format=True)
    assert open_image(folder).shape == (5, 6, 4) and open_image(folder).notes == ("1 DICOM file(s) beside the series hold no image",)


def test_one_plane_with_and_without_a_place(tmp_path):
    plane = slice_of(DATA[0], 0, study())
    plane.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found, file = read_image([tmp_path / "a.dcm"])
    np.testing.assert_array_equal(found[0, ..., 0], DATA[0].T * 2.0 - 1000)
    np.testing.assert_allclose(file.spacing, [0.5, 0.7, 5.0])
    same_places(file, sitk.ReadImage(str(tmp_path / "a.dcm")))
    slice_of(DATA[0], 0, study(), SpacingBetweenSlices=6.0).save_as(tmp_path / "c.dcm", enforce_file_format=True)
    np.testing.assert_allclose(open_image(tmp_path / "c.dcm").spacing, [0.5, 0.7, 6.0])
    slice_of(DATA[0], 0, study(), PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.1]).save_as(tmp_path / "x.dcm", enforce_file_format=True)
    np.testing.assert_allclose(open_image(tmp_path / "x.dcm").spacing, [0.1, 0.2, 5.0])
    bare = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "PixelSpacing": None, "PhotometricInterpretation": "MONOCHROME1"}
    slice_of(DATA[0], 0, study(), **bare).save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert open_image(tmp_path / "b.dcm").notes == ("no pixel size in the file: 1 x 1 mm", "MONOCHROME1: small values are bright; they are kept")
    with pytest.raises(UserError, match=r"out\.dcm: a DICOM-SEG belongs to DICOM images with positions, and .*b\.dcm is none"):
        write_image(tmp_path / "out.dcm", np.zeros((5, 6, 1), np.uint8), open_image(tmp_path / "b.dcm"))
    slice_of(DATA[0], 0, study(), FrameOfReferenceUID=None).save_as(tmp_path / "d.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match=r"a DICOM-SEG belongs to DICOM images with positions, and .*d\.dcm is none"):
        write_image(tmp_path / "out.dcm", np.zeros((5, 6, 1), np.uint8), open_image(tmp_path / "d.dcm"))


@pytest.mark.parametrize("how", ["RLE", "JPEG Lossless"])
def test_compressed_slices(tmp_path, how):
    folder = series(tmp_path / "ct", DATA)
    for path in folder.iterdir():
        table = pydicom.dcmread(path)
        if how == "RLE":
            table.compress(RLELossless, generate_instance_uid=False)
        else:  # SimpleITK compresses the stored values
            writer = sitk.ImageFileWriter()
            writer.SetFileName(str(tmp_path / "one.dcm"))
            writer.SetUseCompression(True)
            writer.SetCompressor("JPEG")
            writer.Execute(sitk.GetImageFromArray(table.pixel_array))
            packed = pydicom.dcmread(tmp_path / "one.dcm")
            table.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
            table["PixelData"] = packed["PixelData"]
        table.save_as(path)
    kinds = {str(pydicom.dcmread(path).file_meta.TransferSyntaxUID.name) for path in folder.iterdir()}
    assert len(kinds) == 1 and how in kinds.pop()
    np.testing.assert_array_equal(read_image([folder])[0][0], DATA.T * 2.0 - 1000)


def enhanced(path, order=(2, 0, 3, 1)):
    """One file with all slices, in a mixed order, each with its own intercept."""
    table = slice_of(DATA[0], 0, study(), SOPClassUID=EnhancedCTImageStorage, RescaleSlope=None, RescaleIntercept=None)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(table, name)
    table.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    table.NumberOfFrames, table.PixelData = len(order), DATA[list(order)].astype("<i2").tobytes()
    table.ImageType, table.ContentDate, table.ContentTime = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "20260101", "120000"

    def group(**tags):
        item = Dataset()
        for name, value in tags.items():
            setattr(item, name, value)
        return [item]

    shared = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[*ACROSS.tolist(), *DOWN.tolist()]),
        PixelMeasuresSequence=group(PixelSpacing=list(PIXEL), SliceThickness=5.0),
    )
    table.SharedFunctionalGroupsSequence = shared
    organisation = generate_uid()
    table.DimensionOrganizationSequence = group(DimensionOrganizationUID=organisation)
    table.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence=group(ImagePositionPatient=(FIRST + z * STEP * NORMAL).tolist()),
            PixelValueTransformationSequence=group(RescaleSlope=1.0, RescaleIntercept=float(z), RescaleType="HU"),
            FrameContentSequence=group(StackID="1", InStackPositionNumber=i + 1),
        )[0]
        for i, z in enumerate(order)
    ]
    table.save_as(path, enforce_file_format=True)
    return path


def test_frames_of_one_file_are_a_volume(tmp_path):
    found, file = read_image([enhanced(tmp_path / "a.dcm")])
    np.testing.assert_array_equal(found[0], DATA.T + np.arange(4))
    single = open_image(series(tmp_path / "ct", DATA))
    np.testing.assert_allclose(file.affine, single.affine, atol=1e-9)


def test_frames_may_share_their_slope_and_each_has_a_place(tmp_path):
    table = pydicom.dcmread(enhanced(tmp_path / "a.dcm"))
    groups = table.PerFrameFunctionalGroupsSequence
    for group in groups:
        del group.PixelValueTransformationSequence
    shared = Dataset()
    shared.RescaleSlope, shared.RescaleIntercept, shared.RescaleType = 2.0, -7.0, "HU"
    table.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [shared]
    table.save_as(tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_image([tmp_path / "b.dcm"])[0][0], DATA.T * 2.0 - 7)
    table.PerFrameFunctionalGroupsSequence = groups[:3]
    table.save_as(tmp_path / "c.dcm")
    with pytest.raises(UserError, match=r"c\.dcm: 4 frames, and 3 places for them"):
        open_image(tmp_path / "c.dcm")


def test_frames_without_places_are_refused(tmp_path):
    table = slice_of(DATA[0], 0, study(), NumberOfFrames=4, PixelData=DATA.astype("<i2").tobytes())
    table.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match=r"4 of 4 slices have no position, as film\.dcm: no volume can be made of them"):
        open_image(tmp_path / "film.dcm")


# -- cases


def test_a_series_is_a_case_with_the_name_of_its_folder(tmp_path):
    series(tmp_path / "in" / "patient1" / "ct", DATA), series(tmp_path / "in" / "patient2", DATA)
    write(tmp_path / "in" / "c.nii.gz", np.zeros((3, 3, 3), np.float32))
    assert [(case.name, case.images) for case in cases_in(tmp_path / "in" / "patient2", 1)] == [("patient2", (tmp_path / "in" / "patient2",))]
    found = cases_of([tmp_path / "in"], 1, out=tmp_path / "out")
    assert {case.name: case.images[0] for case in found} == {
        "c": tmp_path / "in" / "c.nii.gz",
        "patient1/ct": tmp_path / "in" / "patient1" / "ct",
        "patient2": tmp_path / "in" / "patient2",
    }


def test_slices_with_an_ending_and_the_directory_of_a_disk(tmp_path):
    """As on a disk from a hospital: DICOMDIR beside the folders of the series, and names that end in .dcm."""
    folder = series(tmp_path / "ct", DATA)
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".dcm"))
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert [(case.name, case.images) for case in cases_of([tmp_path], 1, out=tmp_path / "out")] == [("ct", (folder,))]


def test_an_old_file_is_known_by_its_name(tmp_path):
    """One without the 128 bytes and DICM before its tags."""
    for name, known in (("a.dcm", True), ("a.DCM", True), ("a.txt", False), ("a", False)):
        (tmp_path / name).write_bytes(b"\x08\0\x05\0CS")
        assert is_dicom(tmp_path / name) is known


def test_slices_of_one_series_are_one_image(tmp_path):
    """As of a shell's ct/*; pictures without a place, as X-rays of one series, are images of their own."""
    folder = series(tmp_path / "ct", DATA)
    with pytest.raises(UserError, match=r"IM007 and .*IM000: slices of one DICOM series: name their folder, which is one image"):
        cases_of(sorted(folder.iterdir()), 1, out=tmp_path / "out")
    assert len(cases_of([folder / "IM007"], 1, out=tmp_path / "out")) == 1
    (folder / "IM007").write_bytes((folder / "IM007").read_bytes()[:200])
    assert len(cases_of([folder / "IM007", folder / "IM000"], 1, out=tmp_path / "out")) == 2  # a damaged one does not end the others
    bare = series(tmp_path / "xray", DATA, lambda i: {"ImagePositionPatient": None})
    assert len(cases_of(sorted(bare.iterdir()), 1, out=tmp_path / "out")) == 4


def test_a_list_may_name_series(tmp_path):
    series(tmp_path / "p1" / "ct", DATA), series(tmp_path / "p2" / "ct", DATA)
    (tmp_path / "list.txt").write_text("p1/ct\np2/ct\n")
    found = cases_of([tmp_path / "list.txt"], 1, out=tmp_path / "out")
    assert [(case.name, case.images[0]) for case in found] == [(f"p{i}/ct", tmp_path / f"p{i}" / "ct") for i in (1, 2)]


def test_a_series_and_other_images_in_one_folder_are_refused(tmp_path):
    folder = series(tmp_path / "ct", DATA)
    write(folder / "b.nii.gz", np.zeros((3, 3, 3), np.float32))
    with pytest.raises(UserError, match=r"ct: a DICOM series, and b\.nii\.gz beside it: name one of them"):
        cases_in(folder, 1)


# -- DICOM-SEG


@pytest.mark.parametrize("several", [True, False], ids=["a series", "frames of one file"])
def test_a_dicom_seg_is_read_in_place_by_others(tmp_path, several):
    source = series(tmp_path / "ct", DATA) if several else enhanced(tmp_path / "a.dcm")
    like = open_image(source)
    write_image(tmp_path / "out.dcm", LABELS, like, CLASSES)
    table = pydicom.dcmread(tmp_path / "out.dcm")
    assert table.Modality == "SEG" and table.pixel_array.shape == (8, 6, 5)
    assert [segment.SegmentLabel for segment in table.SegmentSequence] == ["liver", "tumour"]
    seen = set()
    for frame, pixels in zip(table.PerFrameFunctionalGroupsSequence, table.pixel_array, strict=True):
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        z, number = round(float((place - FIRST) @ NORMAL / STEP)), frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        np.testing.assert_allclose(place, FIRST + z * STEP * NORMAL, atol=1e-6)
        np.testing.assert_array_equal(pixels, [0, 10, 300][number] == LABELS[:, :, z].T)
        seen.add((z, number))
    assert len(seen) == 8
    image = sitk.ReadImage(tmp_path / "out.dcm")  # the frames as they stand; ITK takes no size of a pixel from a DICOM-SEG
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), 255 * table.pixel_array)
    first = table.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    np.testing.assert_allclose(image.GetOrigin(), np.array(first, float), atol=1e-6)
    shared = table.SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == list(PIXEL)
    np.testing.assert_allclose(np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float), [*ACROSS, *DOWN], atol=1e-6)
    np.testing.assert_array_equal(read_label(tmp_path / "out.dcm", like)[0], LABELS)
    assert is_made_here(tmp_path / "out.dcm") and not is_made_here(source if not several else source / "IM000")
    referenced = {item.ReferencedSOPInstanceUID for item in table.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    files = list(source.iterdir()) if several else [source]
    assert referenced == {pydicom.dcmread(path).SOPInstanceUID for path in files}


def test_of_the_person_only_what_the_standard_demands_is_copied(tmp_path):
    source = series(tmp_path / "ct", DATA)
    write_image(tmp_path / "out.dcm", LABELS, open_image(source), CLASSES)
    write_image(tmp_path / "out.nii", LABELS, open_image(source))
    table, first = pydicom.dcmread(tmp_path / "out.dcm"), pydicom.dcmread(source / "IM000")
    kept = "PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName"
    assert all(table.get(name) == first.get(name) for name in kept.split())
    content = (tmp_path / "out.dcm").read_bytes()
    assert b"Doe^Jane" in content
    for text in (b"053Y", b"Elm Street", b"astronaut", b"Princeton", b"Nurse", b"thorax", b"axial", b"Acme"):
        assert text not in content, text
    assert b"Doe" not in (tmp_path / "out.nii").read_bytes() and b"P42" not in (tmp_path / "out.nii").read_bytes()
    assert set(kept.split()) <= set(dicom_seg.__doc__.replace(",", " ").replace(".", " ").replace(":", " ").split())


def test_an_error_shows_no_bytes_of_the_file(tmp_path):
    """pydicom's may show what stands around the damaged place, as a name."""
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x13\0Doe^Jane 1970 42 F")
    with pytest.raises(pydicom.errors.BytesLengthException, match=r"Doe\^Jane"):
        pydicom.dcmread(tmp_path / "a.dcm")
    with pytest.raises(UserError, match=r"a\.dcm: not a readable DICOM file \(.* received … with length") as error:
        open_image(tmp_path / "a.dcm")
    assert "Jane" not in str(error.value)


def test_nothing_half_written_where_a_dicom_seg_fails(tmp_path, monkeypatch):
    like = open_image(series(tmp_path / "ct", DATA))
    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", lambda self, path: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(UserError, match=r"out\.dcm: cannot be written as DICOM-SEG \(division by zero\)"):
        write_image(tmp_path / "out.dcm", LABELS, like, CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]


def test_a_dicom_seg_of_others_is_not_ours(tmp_path):
    """So it is not written over without being asked."""
    like = open_image(series(tmp_path / "ct", DATA))
    write_image(tmp_path / "out.dcm", LABELS, like, {"background": 0, "x" * 80: 10, "tumour": 300})  # a name longer than DICOM's
    assert pydicom.dcmread(tmp_path / "out.dcm").SegmentSequence[0].SegmentLabel == "x" * 64
    table = pydicom.dcmread(tmp_path / "out.dcm")
    table.Manufacturer = "Acme"
    table.save_as(tmp_path / "theirs.dcm")
    assert is_made_here(tmp_path / "out.dcm") and not is_made_here(tmp_path / "theirs.dcm")


def test_values_without_names_are_segments_too(tmp_path):
    like = open_image(series(tmp_path / "ct", DATA))
    write_image(tmp_path / "out.dcm", LABELS, like)
    np.testing.assert_array_equal(read_label(tmp_path / "out.dcm", like)[0], LABELS)


def test_an_empty_label_map_has_the_grid_of_its_image(tmp_path):
    like = open_image(series(tmp_path / "ct", DATA))
    write_image(tmp_path / "out.dcm", np.zeros((5, 6, 4), np.uint8), like, CLASSES)
    found, file = read_label(tmp_path / "out.dcm", like)
    assert found.shape == (5, 6, 4) and not found.any()
    np.testing.assert_allclose(file.affine, like.affine, atol=1e-6)
