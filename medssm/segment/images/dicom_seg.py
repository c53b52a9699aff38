"""DICOM: images through `dicom`, and label maps as DICOM-SEG, read and written by highdicom.

A DICOM-SEG belongs to its images: it names the study, the patient and each slice. Of the person it holds what the standard demands and no more:
PatientName, PatientID, PatientBirthDate, PatientSex, and of the study StudyInstanceUID, StudyID, StudyDate, StudyTime, AccessionNumber and
ReferringPhysicianName. No other tag of the images is read for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from medssm import __version__
from medssm.errors import UserError
from medssm.files import atomic
from medssm.segment.images import dicom
from medssm.segment.images.image import LPS, Image, needed, reason
from medssm.segment.images.quiet import quiet_libraries

ENDINGS = (".dcm",)
_SCHEME = "99MEDSSM"  # of the codes that name our classes: the code is the class's value, its meaning the name
_TAGS = (
    "PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyID StudyDate StudyTime AccessionNumber ReferringPhysicianName "
    "SpecificCharacterSet SOPClassUID SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID PositionReferenceIndicator Modality Rows Columns "
    "NumberOfFrames ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence DimensionOrganizationSequence DimensionIndexSequence"
)


def open_file(path: Path) -> Image:
    """The image or the label map of a DICOM file. Raises UserError if it is none, or is no volume."""
    if dicom.value(path, "SOPClassUID") != dicom.SEG:
        return dicom.open_file(path)
    try:
        with quiet_libraries():
            file = needed("highdicom.seg", path, "DICOM-SEG").segread(path)
            geometry = file.get_volume_geometry()
    except UserError:
        raise
    except Exception as error:  # highdicom and pydicom raise what their checks raise
        raise UserError(f"{path}: not a readable DICOM-SEG ({reason(error)})") from error
    if geometry is None:
        raise UserError(f"{path}: the frames of this DICOM-SEG are no volume")
    z, y, x = geometry.spatial_shape
    affine = LPS @ geometry.affine[:, [2, 1, 0, 3]]

    def load(dtype: DTypeLike | None) -> np.ndarray:
        numbers = file.get_volume(combine_segments=True).array
        values = np.array([0, *(_value(file.get_segment_description(number)) for number in file.segment_numbers)])
        table = np.zeros(max(file.segment_numbers, default=0) + 1, np.int32)
        table[[0, *file.segment_numbers]] = values
        return np.ascontiguousarray(table[numbers].transpose(2, 1, 0)[None])

    return Image(path, "DICOM-SEG", (x, y, z), affine, load)


def write(path: Path, data: np.ndarray, like: Image, classes: Mapping[str, int]) -> None:
    """Write a label map (x, y, z) as DICOM-SEG of the images that `like` came from, a segment for each class but the background.

    Raises UserError if it cannot be written; nothing half written is left.
    """
    seg, codes = needed("highdicom.seg", path, "DICOM-SEG"), needed("highdicom.sr.coding", path, "DICOM-SEG")
    highdicom, uid = needed("highdicom", path, "DICOM-SEG"), needed("pydicom.uid", path, "DICOM-SEG").generate_uid
    named = {name: value for name, value in classes.items() if value != 0}
    frames = like.own.frames
    numbers = np.zeros(data.shape, np.uint16 if len(named) > 255 else np.uint8)
    for number, value in enumerate(named.values(), 1):
        numbers[data == value] = number
    planes = np.empty((len(frames), data.shape[1], data.shape[0]), numbers.dtype)
    several = len({frame.file for frame in frames}) == 1 and len(frames) > 1  # the frames of one file stay in its order
    for z, frame in enumerate(frames):
        planes[frame.number if several else z] = numbers[:, :, z].T
    segments = [
        seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.CodedConcept("123037004", "SCT", "Anatomical Structure"),
            segmented_property_type=codes.CodedConcept(str(value), _SCHEME, name[:64]),
            algorithm_type="AUTOMATIC",
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name="medssm", family=codes.CodedConcept("123109", "DCM", "Artificial Intelligence"), version=__version__
            ),
        )
        for number, (name, value) in enumerate(named.items(), 1)
    ]
    try:
        with quiet_libraries():
            file = seg.Segmentation(
                source_images=[dicom.header(name, _TAGS) for name in dict.fromkeys(frame.file for frame in frames)],
                pixel_array=planes,
                segmentation_type="BINARY",
                segment_descriptions=segments,
                series_instance_uid=uid(),
                series_number=1,
                sop_instance_uid=uid(),
                instance_number=1,
                manufacturer="medssm",
                manufacturer_model_name="medssm",
                software_versions=__version__,
                device_serial_number="0",
                omit_empty_frames=False,
            )
            with atomic(path) as temporary:
                file.save_as(temporary)
    except UserError:
        raise
    except Exception as error:  # highdicom raises what its checks of the images raise
        raise UserError(f"{path}: cannot be written as DICOM-SEG ({reason(error)})") from error


def beside(path: Path) -> list[Path]:
    """A DICOM file is read alone."""
    return []


def check_output(path: Path, like: Image) -> None:
    """UserError for images that are no DICOM, or have no place in a patient: a DICOM-SEG belongs to such images."""
    if like.format != "DICOM" or not like.own.placed:
        raise UserError(f"{path}: a DICOM-SEG belongs to DICOM images with positions, and {like.path} is none: name a file that ends in .nii.gz")


def made_here(path: Path) -> bool:
    """Whether a file was written by `write`."""
    with contextlib.suppress(UserError):
        return dicom.value(path, "SOPClassUID") == dicom.SEG and dicom.value(path, "Manufacturer") == "medssm"
    return False


def _value(segment: Any) -> int:
    """The value of a segment in a label map: that of our class, or another program's number."""
    code = segment.segmented_property_type
    return int(code.value) if code.scheme_designator == _SCHEME else int(segment.segment_number)
