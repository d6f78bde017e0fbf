"""The standard parts, declared as any plugin declares its own."""

from __future__ import annotations

from attnguide.hookspecs import Part, hookimpl

__all__ = ["attnguide_parts"]


@hookimpl
def attnguide_parts() -> list[Part]:
    """Declare the parts that come with the core."""
    sources, priors, losses = "attnguide.sources", "attnguide.priors", "attnguide.losses"
    return [
        Part("source", "grad_cam", f"{sources}.grad_cam:GradCAM", "channels weighted by their mean gradient"),
        Part("source", "cam", f"{sources}.grad_cam:CAM", "Grad-CAM with the evidence against, lifted to 0"),
        Part(
            "source",
            "grad_cam_plus_plus",
            f"{sources}.grad_cam:GradCAMPlusPlus",
            "Grad-CAM, better with several objects",
        ),
        Part(
            "source",
            "layer_cam",
            f"{sources}.grad_cam:LayerCAM",
            "each position weighted by its positive gradient",
        ),
        Part(
            "source",
            "hires_cam",
            f"{sources}.grad_cam:HiResCAM",
            "gradient times feature, position by position",
        ),
        Part(
            "source",
            "layer_attention",
            f"{sources}.layer_attention:LayerAttention",
            "channel mean; the same for all classes",
        ),
        Part(
            "prior",
            "mask",
            f"{priors}.mask:MaskPrior",
            "masks for all images, per image, per class, or a template",
        ),
        Part("prior", "boxes", f"{priors}.boxes:BoxPrior", "bounding boxes in pixels"),
        Part("loss", "iou", f"{losses}.overlap:IoU", "−ln of the soft intersection over union"),
        Part("loss", "cosine", f"{losses}.overlap:Cosine", "1 − cosine; keeps signs"),
        Part("loss", "energy", f"{losses}.overlap:Energy", "share of the attribution outside the prior"),
        Part("loss", "mse", f"{losses}.overlap:MSE", "mean squared difference"),
    ]
