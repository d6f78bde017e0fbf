from .compare import (
    Change as Change,
    ChangeKind as ChangeKind,
    Comparison as Comparison,
    Overlays as Overlays,
    compare_folder as compare_folder,
    draw_overlays as draw_overlays,
)
from .evaluate import (
    METRICS as METRICS,
    ClassResult as ClassResult,
    Evaluation as Evaluation,
    ImageResult as ImageResult,
    LabeledImage as LabeledImage,
    MaskFor as MaskFor,
    evaluate_folder as evaluate_folder,
    labeled_images as labeled_images,
    mask_reader as mask_reader,
    preprocess_mask as preprocess_mask,
    single_label_images as single_label_images,
)
from .groups import read_groups as read_groups
from .report import write_report as write_report
from .stored import (
    compare_maps as compare_maps,
    draw_maps as draw_maps,
    evaluate_maps as evaluate_maps,
    missing_images as missing_images,
)
