"""The page on which masks are painted: `attnguide annotate`.

- [`sheets`][attnguide_gradcam_iou.painting.sheets]: what is painted on, images or a template;
- [`store`][attnguide_gradcam_iou.painting.store]: where the masks are kept;
- [`import_export`][attnguide_gradcam_iou.painting.import_export]: LabelMe and COCO;
- [`watching`][attnguide_gradcam_iou.painting.watching]: what a model looks at;
- [`parts`][attnguide_gradcam_iou.painting.parts]: the parts of a face;
- [`tuning`][attnguide_gradcam_iou.painting.tuning]: fine-tuning in the background;
- [`server`][attnguide_gradcam_iou.painting.server]: the server, and `page/`, what the browser gets.

Only `watching`, `parts` and `tuning` import torch, once what they do is asked for.
"""
