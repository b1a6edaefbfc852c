"""Sets of labelled images: what they look like on disk, whether they are sound, how they are divided."""

from .checking import DatasetReport, Problem, check_records
from .layouts import read_bmad, read_dataset, read_json_lines, read_mvtec, read_volumes
from .planes import lesion_mask, planes_of
from .protocols import Fold, Shots, cross_task, draw_shots, few_shot, leave_one_out, read_shot_list
from .records import ImageRecord, modality_family, read_manifest
from .support import left_out_records, read_support

__all__ = [
    "DatasetReport",
    "Fold",
    "ImageRecord",
    "Problem",
    "Shots",
    "check_records",
    "cross_task",
    "draw_shots",
    "few_shot",
    "leave_one_out",
    "left_out_records",
    "lesion_mask",
    "modality_family",
    "planes_of",
    "read_bmad",
    "read_dataset",
    "read_json_lines",
    "read_manifest",
    "read_mvtec",
    "read_shot_list",
    "read_support",
    "read_volumes",
]
