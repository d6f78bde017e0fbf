"""Declares the standard parts, as a plugin does."""

from __future__ import annotations

from attnguide.parts.hookspecs import Part, hookimpl

__all__ = ["CAMS", "CAPTUM_OF_IMAGES", "CAPTUM_OF_LAYERS", "ZENNIT", "attnguide_parts"]

#: The methods of pytorch-grad-cam.
CAMS = (
    "AblationCAM",
    "EigenCAM",
    "EigenGradCAM",
    "FEM",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "KPCA_CAM",
    "LayerCAM",
    "RandomCAM",
    "RefineCAM",
    "SESS",
    "ScoreCAM",
    "SegEigenCAM",
    "ShapleyCAM",
    "XGradCAM",
)
#: zennit's composites: sets of rules for the layers of a network.
ZENNIT = (
    "BetaSmooth",
    "DeconvNet",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "ExcitationBackprop",
    "GuidedBackprop",
)

#: captum's attributions of images, and of layers; those of neurons, text and training data are left out.
CAPTUM_OF_IMAGES = (
    "DeepLift",
    "DeepLiftShap",
    "Deconvolution",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LRP",
    "Lime",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
)
CAPTUM_OF_LAYERS = (
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
)


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
        Part("source", "xgrad_cam", f"{sources}.grad_cam:XGradCAM", "gradients averaged where it is active"),
        Part("source", "input_gradient", f"{sources}.gradient:Gradient", "norm of the image's gradient"),
        Part(
            "source",
            "input_x_gradient",
            f"{sources}.gradient:GradientTimesInput",
            "gradient times image; signed",
        ),
        Part(
            "source",
            "attention_rollout",
            f"{sources}.attention:AttentionRollout",
            "attention of all blocks, multiplied",
        ),
        Part(
            "source",
            "transformer_relevance",
            f"{sources}.attention:TransformerRelevance",
            "attention times gradient, through all blocks",
        ),
        Part(
            "source",
            "layer_attention",
            f"{sources}.layer_attention:LayerAttention",
            "channel mean; the same for all classes",
        ),
        *(
            Part("source", f"captum:{name}", f"{sources}.captum:{name}", f"captum.attr.{name}, of the images")
            for name in CAPTUM_OF_IMAGES
        ),
        *(
            Part("source", f"captum:{name}", f"{sources}.captum:{name}", f"captum.attr.{name}, of a layer")
            for name in CAPTUM_OF_LAYERS
        ),
        *(
            Part("source", f"cam:{name}", f"{sources}.cam:{name}", f"pytorch_grad_cam.{name}")
            for name in CAMS
        ),
        *(
            Part("source", f"zennit:{name}", f"{sources}.zennit:{name}", f"zennit.composites.{name}")
            for name in ZENNIT
        ),
        Part(
            "prior",
            "mask",
            f"{priors}.mask:MaskPrior",
            "masks for all images, per image, per class, or a template",
        ),
        Part("prior", "boxes", f"{priors}.boxes:BoxPrior", "bounding boxes in pixels"),
        Part("prior", "landmarks", f"{priors}.landmarks:LandmarkPrior", "Gaussians at points"),
        Part("prior", "segmenter", f"{priors}.segmenter:SegmenterPrior", "by a segmentation network"),
        Part("prior", "teacher", f"{priors}.teacher:TeacherPrior", "where another model looks"),
        Part("prior", "text", f"{priors}.text:TextPrior", "what a CLIP-like model finds for words"),
        Part(
            "prior",
            "token_cut",
            f"{priors}.token_cut:TokenCutPrior",
            "the object, by a normalized cut of a network's features",
        ),
        Part("loss", "iou", f"{losses}.overlap:IoU", "−ln of the soft intersection over union"),
        Part("loss", "cosine", f"{losses}.overlap:Cosine", "1 − cosine; keeps signs"),
        Part("loss", "energy", f"{losses}.overlap:Energy", "share of the attribution outside the prior"),
        Part("loss", "dice", f"{losses}.overlap:Dice", "1 − the soft Dice coefficient"),
        Part("loss", "kl", f"{losses}.overlap:KL", "divergence from the prior, both as distributions"),
        Part(
            "loss",
            "correlation",
            f"{losses}.overlap:Correlation",
            "1 − correlation: constants do not count",
        ),
        Part("loss", "erase", f"{losses}.erase:Erase", "the class that is left without what the map covers"),
        Part("loss", "mse", f"{losses}.pointwise:MSE", "mean squared difference"),
        Part("loss", "hint", f"{losses}.pointwise:MSE", "mean squared difference, by its published name"),
        Part("loss", "l1", f"{losses}.pointwise:L1", "mean absolute difference"),
        Part("loss", "ppce", f"{losses}.pointwise:PPCE", "cross entropy that rewards evidence inside"),
        Part(
            "loss",
            "inside_outside",
            f"{losses}.pointwise:InsideOutside",
            "squared attribution outside, and what is missing inside",
        ),
        Part("loss", "outside", f"{losses}.pointwise:Outside", "squared attribution where it is forbidden"),
        Part(
            "recipe",
            "right-for-real",
            "attnguide.parts:recipes/right-for-real.toml",
            "for photographs: the prediction does not change with what is outside of the mask",
        ),
        Part(
            "recipe",
            "distillation",
            "attnguide.parts:recipes/distillation.toml",
            "look where a teacher looks; by default the model before its training",
        ),
        Part(
            "recipe",
            "gals",
            "attnguide.parts:recipes/gals.toml",
            "words say what to look at; no gradient of the images elsewhere",
        ),
        Part(
            "recipe",
            "robust-vit",
            "attnguide.parts:recipes/robust-vit.toml",
            "relevance of a vision transformer: low outside of the object, high inside",
        ),
        Part(
            "recipe",
            "gain",
            "attnguide.parts:recipes/gain.toml",
            "attention mining: without what the map covers the class is lost",
        ),
        Part(
            "recipe",
            "rrr",
            "attnguide.parts:recipes/rrr.toml",
            "right for the right reasons: image gradients",
        ),
        Part(
            "recipe",
            "signed-evidence",
            "attnguide.parts:recipes/signed-evidence.toml",
            "the same at a layer, at low cost: no evidence outside, for any class",
        ),
    ]
