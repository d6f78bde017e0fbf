from .compare import Comparison as Comparison, compare_folder as compare_folder
from .evaluate import (
    Evaluation as Evaluation,
    evaluate_folder as evaluate_folder,
    labelled_images as labelled_images,
    mask_reader as mask_reader,
)
from .groups import read_groups as read_groups
from .report import write_report as write_report
